"""Dense detectors: feature levels → candidates of a fixed number a level → NMS → detections on the canvas.

What detectron2 selects with a threshold a fixed top-k selects here: per level the best (location, class) pairs, whose
scores are then zeroed where they miss the threshold. Families differ in what they rank and how they decode; that is
their decoder, the rest is :class:`DenseGraph`.

Shape legend: N images, A anchors a location, K classes, (h, w) a level's grid, M candidates of a level.
"""

from __future__ import annotations

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import Tensor, nn

from export.graph_parts import InferenceSettings, on_canvas
from export.nms import greedy_nms, rows
from export.signature import DetectorSignature

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


def retinanet_graph(detector: RetinaNet, signature: DetectorSignature) -> DenseGraph:
    """The export graph of detectron2's RetinaNet."""
    features = _features_on_canvas(detector, signature)
    anchors = [boxes.tensor for boxes in detector.anchor_generator(features)]
    return DenseGraph(detector, signature, DeltaDecoder(detector, anchors))


class DenseGraph(nn.Module):
    """A dense detector from uint8 canvas to detections; ``forward`` is what is exported.

    Args:
        detector: shares its backbone and head with the graph; set to eval mode.
        signature: canvas, thresholds and number of detections.
        decoder: called with a level's index and the head's outputs on it; returns the level's :data:`Candidates`, those
            below the threshold with score 0.
    """

    def __init__(self, detector: DenseDetector, signature: DetectorSignature, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head
        self.decoder = decoder
        self.head_in_features = tuple(detector.head_in_features)
        self.signature = signature
        self.register_buffer("mean", detector.pixel_mean.detach().clone().float())
        self.register_buffer("std", detector.pixel_std.detach().clone().float())
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`export.detector_graph.detector_graph`."""
        features = self.backbone((images.float() - self.mean) / self.std)
        outputs = self.head([features[name] for name in self.head_in_features])
        levels = [self.decoder(level, *predicted) for level, predicted in enumerate(zip(*outputs, strict=True))]
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        boxes, scores, labels = greedy_nms(
            boxes,
            scores,
            labels,
            iou_threshold=self.signature.nms_threshold,
            max_detections=self.signature.max_detections,
        )
        return on_canvas(boxes, scores, labels, self.signature)


class DeltaDecoder(nn.Module):
    """RetinaNet's: rank by logit, boxes as deltas of anchors.

    Args:
        anchors: per level (h * w * A, 4) xyxy; the canvas is fixed, so they are constants.
    """

    def __init__(self, detector: RetinaNet, anchors: list[Tensor]) -> None:
        super().__init__()
        self.num_classes = detector.num_classes
        self.num_candidates = detector.test_topk_candidates
        self.score_threshold = detector.test_score_thresh
        transform = detector.box2box_transform
        self.scale_clamp = float(transform.scale_clamp)
        weights = torch.tensor(transform.weights, dtype=torch.float32, device=detector.pixel_mean.device)
        self.register_buffer("delta_weights", weights)
        for level, boxes in enumerate(anchors):
            self.register_buffer(f"anchors_{level}", boxes.float())

    def forward(self, level: int, logits: Tensor, deltas: Tensor) -> Candidates:
        """(N, A * K, h, w) and (N, A * 4, h, w) → the level's candidates.

        The top-k is over logits, as sigmoid is monotonic: only M values are activated.
        """
        top_logits, index, labels = top_pairs(logits, self.num_classes, self.num_candidates)
        anchors = getattr(self, f"anchors_{level}")[index]
        boxes = self._decoded(rows(by_location(deltas, 4), index).float(), anchors)
        return boxes, zero_below(top_logits.float().sigmoid(), self.score_threshold), labels

    def _decoded(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """``Box2BoxTransform.apply_deltas``, operation for operation: (N, M, 4) and (N, M, 4) → (N, M, 4)."""
        size = anchors[..., 2:] - anchors[..., :2]
        centre = anchors[..., :2] + 0.5 * size
        deltas = deltas / self.delta_weights
        centre = deltas[..., :2] * size + centre
        size = deltas[..., 2:].clamp(max=self.scale_clamp).exp() * size
        return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def top_pairs(ranking: Tensor, num_classes: int, num_candidates: int) -> Candidates:
    """The level's best (anchor, class) pairs.

    Args:
        ranking: (N, A * K, h, w).

    Returns:
        Values (N, M) descending, their anchors' positions (N, M) in detectron2's order (h, w, A), and labels (N, M)
        int32.

    The top-k reads the head's own layout (A, K, h, w), which saves a transpose of the largest tensor.
    """
    grid = ranking.shape[2] * ranking.shape[3]
    num_anchors = ranking.shape[1] // num_classes
    flat = ranking.flatten(1)
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


def zero_below(scores: Tensor, threshold: float) -> Tensor:
    """Scores with those not above the threshold set to 0, which stands for no candidate."""
    return torch.where(scores > threshold, scores, torch.zeros_like(scores))


def _features_on_canvas(detector: DenseDetector, signature: DetectorSignature) -> list[Tensor]:
    """The head's input levels of an empty canvas: what a level's grid is, for constants to be made from."""
    images = torch.zeros(1, *signature.image_shape, device=detector.pixel_mean.device)
    with torch.no_grad():
        features = detector.eval().backbone(images)
    return [features[name] for name in detector.head_in_features]
