"""Dense detectors: feature levels → candidates of a fixed number a level → NMS → detections on the canvas.

What detectron2 selects with a threshold a fixed top-k selects here: per level the best (location, class) pairs, whose
scores are then zeroed where they miss the threshold. Families differ in what they rank and how they decode; that is
their decoder, the rest is :class:`DenseGraph`.

Shape legend: N images, A anchors a location, K classes, (h, w) a level's grid, M candidates of a level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import Tensor, nn

from export.config import NmsChoice
from export.graph_parts import (
    DetectorGraph,
    InferenceSettings,
    Outputs,
    boxes_from_deltas,
    ended,
    named_levels,
    nms_of,
)
from export.nms import rows
from export.signature import DetectorSignature
from training.detectors.distribution_retinanet import DistributionRetinaNet
from training.detectors.location_detector import LocationBase, LocationDetector
from training.detectors.locations import location_grid

Candidates = tuple[Tensor, Tensor, Tensor]  # boxes (N, M, 4), scores (N, M), labels (N, M)


def dense_settings(detector: DenseDetector) -> InferenceSettings:
    """Read the inference settings that dense detectors keep under the same names."""
    return InferenceSettings(
        num_classes=detector.num_classes,
        num_candidates=detector.test_topk_candidates,
        score_threshold=detector.test_score_thresh,
        nms_threshold=detector.test_nms_thresh,
        max_detections=detector.max_detections_per_image,
    )


def retinanet_graph(detector: RetinaNet, signature: DetectorSignature, nms: NmsChoice) -> DenseGraph:
    """The export graph of detectron2's RetinaNet."""
    features = _features_on_canvas(detector, signature)
    anchors = [boxes.tensor for boxes in detector.anchor_generator(features)]
    return DenseGraph(detector, signature, DeltaDecoder(detector, anchors), nms)


def fcos_graph(detector: FCOS, signature: DetectorSignature, nms: NmsChoice) -> DenseGraph:
    """The export graph of detectron2's FCOS; its centerness may come from either tower, that is inside its head."""
    features = _features_on_canvas(detector, signature)
    anchors = [boxes.tensor for boxes in detector.anchor_generator(features)]
    centres = [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in anchors]
    by_size = detector.box2box_transform.normalize_by_size
    units = [boxes[:, 2] - boxes[:, 0] if by_size else torch.ones_like(boxes[:, 0]) for boxes in anchors]
    return DenseGraph(detector, signature, FcosDecoder(detector, centres, units), nms)


def distribution_retinanet_graph(
    detector: DistributionRetinaNet, signature: DetectorSignature, nms: NmsChoice
) -> DenseGraph:
    """The export graph of RetinaNet with distributions: the centres of its anchors are locations without centerness."""
    anchors = [boxes.tensor for boxes in detector.anchor_generator(_features_on_canvas(detector, signature))]
    centres = [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in anchors]
    levels = zip(centres, detector.anchor_generator.strides, strict=True)
    strides = [torch.full_like(points[:, 0], stride) for points, stride in levels]
    return DenseGraph(detector, signature, LocationDecoder(detector, centres, strides), nms)


def location_graph(detector: LocationBase, signature: DetectorSignature, nms: NmsChoice) -> DenseGraph:
    """The export graph of paper-style FCOS, ATSS, and GFL."""
    grid = location_grid(_features_on_canvas(detector, signature), detector.strides)
    points, strides = (values.split(grid.num_per_level) for values in (grid.points, grid.strides))
    return DenseGraph(detector, signature, LocationDecoder(detector, points, strides), nms)


class DenseGraph(DetectorGraph):
    """A dense detector from uint8 canvas to detections; ``forward`` is what is exported.

    Args:
        detector: shares its backbone and head with the graph; set to eval mode.
        signature: canvas, thresholds and number of detections.
        decoder: called with a level's index and the head's outputs on it; returns the level's :data:`Candidates`, those
            below the threshold with score 0. Its ``head_tensor_names`` names the head's outputs.
        nms: see :func:`export.detector_graph.detector_graph`.
    """

    def __init__(
        self, detector: DenseDetector, signature: DetectorSignature, decoder: nn.Module, nms: NmsChoice
    ) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head
        self.decoder = decoder
        self.head_tensor_names = decoder.head_tensor_names
        self.head_in_features = tuple(detector.head_in_features)
        self.signature = signature
        self.nms = nms_of(nms, len(signature.class_names))
        self.register_buffer("mean", detector.pixel_mean.detach().clone().float())
        self.register_buffer("std", detector.pixel_std.detach().clone().float())
        self.eval()

    def with_head_tensors(self, images: Tensor) -> tuple[Outputs, dict[str, Tensor]]:
        features = self.backbone((images.float() - self.mean) / self.std)
        outputs = self.head([features[name] for name in self.head_in_features])
        levels = [self.decoder(level, *predicted) for level, predicted in enumerate(zip(*outputs, strict=True))]
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        detections = ended(boxes, scores, labels, self.nms, self.signature)
        return detections, named_levels(self.head_tensor_names, outputs)


class DeltaDecoder(nn.Module):
    """RetinaNet's: rank by logit, boxes as deltas of anchors.

    Args:
        anchors: per level (h * w * A, 4) xyxy pixels.
    """

    head_tensor_names = ("class_logits", "box_deltas")

    def __init__(self, detector: RetinaNet, anchors: Sequence[Tensor]) -> None:
        super().__init__()
        self.num_classes = detector.num_classes
        self.num_candidates = detector.test_topk_candidates
        self.score_threshold = detector.test_score_thresh
        self.delta_weights = tuple(detector.box2box_transform.weights)
        self.scale_clamp = float(detector.box2box_transform.scale_clamp)
        _register_levels(self, anchors=anchors)

    def forward(self, level: int, logits: Tensor, deltas: Tensor) -> Candidates:
        """(N, A * K, h, w) and (N, A * 4, h, w) → the level's candidates.

        The top-k is over logits, as sigmoid is monotonic: only M values are activated.
        """
        floor = logit_floor(self.score_threshold)
        top_logits, index, labels = top_pairs(logits, self.num_classes, self.num_candidates, floor)
        anchors = getattr(self, f"anchors_{level}")[index]
        boxes = boxes_from_deltas(rows(by_location(deltas, 4), index), anchors, self.delta_weights, self.scale_clamp)
        return boxes, zero_below(top_logits.float().sigmoid(), self.score_threshold), labels


class FcosDecoder(nn.Module):
    """detectron2's FCOS: rank by ``sqrt(class score * centerness)``, boxes as distances from the anchors' centres.

    Args:
        points: per level (h * w, 2), x and y in pixels.
        units: per level (h * w,), what the head's distances are multiplied by to be pixels.
    """

    head_tensor_names = ("class_logits", "box_distances", "centerness")

    def __init__(self, detector: FCOS, points: Sequence[Tensor], units: Sequence[Tensor]) -> None:
        super().__init__()
        self.num_classes = detector.num_classes
        self.num_candidates = detector.test_topk_candidates
        self.score_threshold = detector.test_score_thresh
        _register_levels(self, points=points, units=units)

    def forward(self, level: int, logits: Tensor, distances: Tensor, centerness: Tensor) -> Candidates:
        """(N, K, h, w), (N, 4, h, w) of any sign and (N, 1, h, w) → the level's candidates."""
        scores = (logits.float().sigmoid() * centerness.float().sigmoid()).sqrt()
        top_scores, index, labels = top_pairs(scores, self.num_classes, self.num_candidates, self.score_threshold)
        edges = rows(by_location(distances, 4), index).float().relu()
        boxes = _boxes(getattr(self, f"points_{level}")[index], edges * getattr(self, f"units_{level}")[index, None])
        return boxes, zero_below(top_scores, self.score_threshold), labels


class LocationDecoder(nn.Module):
    """Boxes by their edges' distances, predicted as such or as distributions: rank and threshold by class score, then
    multiply by centerness where there is any.

    Args:
        points: per level (h * w * A, 2), x and y in pixels.
        strides: per level (h * w * A,), the unit of the head's distances in pixels.
    """

    def __init__(
        self,
        detector: LocationBase | DistributionRetinaNet,
        points: Sequence[Tensor],
        strides: Sequence[Tensor],
    ) -> None:
        super().__init__()
        names = ("class_logits", "edge_values", "centerness")
        self.head_tensor_names = names if isinstance(detector, LocationDetector) else names[:2]
        self.edges = detector.head.edges
        self.num_classes = detector.num_classes
        self.num_candidates = detector.test_topk_candidates
        self.score_threshold = detector.test_score_thresh
        _register_levels(self, points=points, strides=strides)

    def forward(self, level: int, logits: Tensor, values: Tensor, centerness: Tensor | None = None) -> Candidates:
        """(N, A * K, h, w), (N, A * 4 * D, h, w) and (N, 1, h, w) → the level's candidates; D is the values an edge."""
        floor = logit_floor(self.score_threshold)
        top_logits, index, labels = top_pairs(logits, self.num_classes, self.num_candidates, floor)
        scores = zero_below(top_logits.float().sigmoid(), self.score_threshold)
        if centerness is not None:
            scores = (scores * rows(by_location(centerness, 1), index)[:, :, 0].float().sigmoid()).sqrt()
        distances = self.edges.distances(rows(by_location(values, 4 * self.edges.values_per_edge), index))
        distances = distances * getattr(self, f"strides_{level}")[index, None]
        return _boxes(getattr(self, f"points_{level}")[index], distances), scores, labels


def top_pairs(ranking: Tensor, num_classes: int, num_candidates: int, floor: float = -math.inf) -> Candidates:
    """The level's best (anchor, class) pairs.

    Args:
        ranking: (N, A * K, h, w).
        floor: values below it are of no interest, and which of them are taken is left open; they come out as it.

    Returns:
        Values (N, M) descending, their anchors' positions (N, M) in detectron2's order (h, w, A), and labels (N, M)
        int32.

    The top-k reads the head's own layout (A, K, h, w), which saves a transpose of the largest tensor. The floor makes
    it cheap in ONNX Runtime on a CPU, which pays for every value that is better than the worst it holds: from the head
    to NMS 1.7 ms of one core became 1.1 (MobileNetV2 RetinaNet, 256 px, 16 classes, 280 to 1,936 passing candidates).
    """
    grid = ranking.shape[2] * ranking.shape[3]
    num_anchors = ranking.shape[1] // num_classes
    flat = ranking.flatten(1)
    if floor > -math.inf:
        flat = flat.clamp(min=floor)
    values, top = flat.topk(min(num_candidates, flat.shape[1]), dim=1)
    plane = top // grid
    anchor = plane // num_classes
    labels = plane - anchor * num_classes
    return values, (top - plane * grid) * num_anchors + anchor, labels.int()


def by_location(predicted: Tensor, num_values: int) -> Tensor:
    """The head's (N, A * D, h, w) as detectron2's (N, h * w * A, D), D being ``num_values``."""
    grid = predicted.shape[2] * predicted.shape[3]
    num_anchors = predicted.shape[1] // num_values
    return (
        predicted.reshape(-1, num_anchors, num_values, grid)
        .permute(0, 3, 1, 2)
        .reshape(-1, grid * num_anchors, num_values)
    )


def logit_floor(score_threshold: float) -> float:
    """A logit whose score is not above the threshold, by more than rounding in half precision can change."""
    return math.log(score_threshold / (1 - score_threshold)) - 0.01 if 0 < score_threshold < 1 else -math.inf


def zero_below(scores: Tensor, threshold: float) -> Tensor:
    """Scores with those not above the threshold set to 0, which stands for no candidate."""
    return torch.where(scores > threshold, scores, torch.zeros_like(scores))


def _boxes(points: Tensor, edges: Tensor) -> Tensor:
    """Boxes whose edges lie at these distances (N, M, 4) from the points (N, M, 2)."""
    return torch.cat([points - edges[..., :2], points + edges[..., 2:]], dim=-1)


def _register_levels(module: nn.Module, **constants: Sequence[Tensor]) -> None:
    """Keep a tensor of each level as the buffer ``<name>_<level>``: the canvas is fixed, so they are constants."""
    for name, levels in constants.items():
        for level, values in enumerate(levels):
            module.register_buffer(f"{name}_{level}", values.float().contiguous())


def _features_on_canvas(detector: DenseDetector, signature: DetectorSignature) -> list[Tensor]:
    """The head's input levels of an empty canvas: what a level's grid is, for constants to be made from."""
    images = torch.zeros(1, *signature.image_shape, device=detector.pixel_mean.device)
    with torch.no_grad():
        features = detector.eval().backbone(images)
    return [features[name] for name in detector.head_in_features]
