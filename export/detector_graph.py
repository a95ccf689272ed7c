"""Stock detectron2 detector → one tensor-in, tensor-out graph with preprocessing, decoding and NMS inside.

The graph is what detectron2 computes on the same canvas, with static shapes but for the batch: per level a fixed top-k
instead of a threshold, then exact greedy NMS, then clipping. Decoding and NMS are float32 whatever the rest is. A
family is one function registered with :func:`detector_graph`.

Shape legend: N images, A anchors a location, K classes, (h, w) a level's grid, M candidates, R detection slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import Tensor, nn

from export.nms import greedy_nms, rows
from export.signature import DetectorSignature


class UnsupportedDetector(ValueError):
    """The detector, or what is asked of it, has no export graph."""

    exit_code = 2


@functools.singledispatch
def detector_graph(detector: nn.Module, signature: DetectorSignature) -> nn.Module:
    """Build the export graph of a stock detector.

    The graph shares the detector's parameters, sets it to eval mode and lives on its device.

    Args:
        detector: a detectron2 detector.
        signature: what the graph must take and give (:func:`signature_of`).

    Returns:
        A module: uint8 images (N, 3, H, W) → ``num_detections, boxes, scores, labels`` as the signature says.

    Raises:
        UnsupportedDetector: no rule for this family, or canvas, classes and detector do not fit together.
    """
    supported = ", ".join(sorted(cls.__name__ for cls in detector_graph.registry if cls is not object))
    raise UnsupportedDetector(
        f"export: there is no export graph for {type(detector).__module__}.{type(detector).__name__}; supported "
        f"families: {supported}. A family is one function in export/detector_graph.py."
    )


@detector_graph.register
def _(detector: RetinaNet, signature: DetectorSignature) -> nn.Module:
    return RetinaNetGraph(detector, signature)


def signature_of(
    detector: nn.Module,
    *,
    canvas: tuple[int, int],
    short_edge: int,
    max_edge: int,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    max_batch_size: int,
) -> DetectorSignature:
    """Read from a stock detector what its exported form promises.

    Args:
        detector: a detectron2 dense detector; thresholds, means and channel order are its own.
        canvas: (H, W) in pixels, divisible by the backbone's stride.
        short_edge, max_edge: detectron2's ``ResizeShortestEdge`` rule, pixels.
        class_names, category_ids: of each label, in label order.
        max_batch_size: largest N.
    """
    if not isinstance(detector, RetinaNet):
        detector_graph(detector, None)  # type: ignore[arg-type]  # raises, naming what is supported
    if short_edge > min(canvas) or max_edge > max(canvas):
        raise UnsupportedDetector(
            f"export: images resized to short edge {short_edge} and at most {max_edge} do not fit a canvas of "
            f"{canvas[0]} x {canvas[1]} (H x W) pixels; enlarge export.canvas or lower the edges"
        )
    return DetectorSignature(
        canvas_height=canvas[0],
        canvas_width=canvas[1],
        short_edge_pixels=short_edge,
        max_edge_pixels=max_edge,
        channel_order=detector.input_format,
        pad_value=tuple(round(v) for v in detector.pixel_mean.flatten().tolist()),
        max_batch_size=max_batch_size,
        max_detections=detector.max_detections_per_image,
        score_threshold=detector.test_score_thresh,
        nms_threshold=detector.test_nms_thresh,
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
    )


class RetinaNetGraph(nn.Module):
    """RetinaNet from uint8 canvas to detections; ``forward`` is what is exported."""

    def __init__(self, detector: RetinaNet, signature: DetectorSignature) -> None:
        super().__init__()
        _check(detector, signature)
        self.backbone = detector.backbone
        self.head = detector.head
        self.head_in_features = tuple(detector.head_in_features)
        self.num_classes = detector.num_classes
        self.num_candidates = detector.test_topk_candidates
        self.signature = signature
        transform = detector.box2box_transform
        self.scale_clamp = float(transform.scale_clamp)
        device = detector.pixel_mean.device
        self.register_buffer("mean", detector.pixel_mean.detach().clone().float())
        self.register_buffer("std", detector.pixel_std.detach().clone().float())
        self.register_buffer("delta_weights", torch.tensor(transform.weights, dtype=torch.float32, device=device))
        self.eval()
        # The canvas is fixed, so the anchors are too: run the backbone once for the grids and bake them.
        with torch.no_grad():
            features = self.backbone(torch.zeros(1, *signature.image_shape, device=device))
        anchors = detector.anchor_generator([features[name] for name in self.head_in_features])
        for level, boxes in enumerate(anchors):
            self.register_buffer(f"anchors_{level}", boxes.tensor.float())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`detector_graph`."""
        features = self.backbone((images.float() - self.mean) / self.std)
        logits, deltas = self.head([features[name] for name in self.head_in_features])
        levels = [self._candidates(level, *pair) for level, pair in enumerate(zip(logits, deltas, strict=True))]
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        scores = torch.where(scores > self.signature.score_threshold, scores, torch.zeros_like(scores))
        boxes, scores, labels = greedy_nms(
            boxes,
            scores,
            labels,
            iou_threshold=self.signature.nms_threshold,
            max_detections=self.signature.max_detections,
        )
        return self._on_canvas(boxes, scores, labels)

    def _candidates(self, level: int, logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The level's best (anchor, class) pairs: boxes (N, M, 4), scores (N, M), labels (N, M).

        Args:
            logits: (N, A * K, h, w).
            deltas: (N, A * 4, h, w).

        The top-k is over logits, as sigmoid is monotonic: only M values are activated. It reads them in the head's own
        layout (A, K, h, w), which saves a transpose of the largest tensor; detectron2's order is (h, w, A, K).
        """
        anchors = getattr(self, f"anchors_{level}")
        grid = logits.shape[2] * logits.shape[3]
        num_anchors = logits.shape[1] // self.num_classes
        flat = logits.flatten(1)
        top_logits, top = flat.topk(min(self.num_candidates, flat.shape[1]), dim=1)
        plane = top // grid
        anchor = plane // self.num_classes
        labels = plane - anchor * self.num_classes
        index = (top - plane * grid) * num_anchors + anchor
        deltas = deltas.reshape(-1, num_anchors, 4, grid).permute(0, 3, 1, 2).reshape(-1, grid * num_anchors, 4)
        boxes = self._decoded(rows(deltas, index).float(), anchors[index])
        return boxes, top_logits.float().sigmoid(), labels.int()

    def _decoded(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """``Box2BoxTransform.apply_deltas``, operation for operation: (N, M, 4) and (N, M, 4) → (N, M, 4)."""
        size = anchors[..., 2:] - anchors[..., :2]
        centre = anchors[..., :2] + 0.5 * size
        deltas = deltas / self.delta_weights
        centre = deltas[..., :2] * size + centre
        size = deltas[..., 2:].clamp(max=self.scale_clamp).exp() * size
        return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)

    def _on_canvas(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clip to the canvas, drop what becomes empty (``detector_postprocess``) and close the gaps."""
        x = boxes[..., 0::2].clamp(0, self.signature.canvas_width)
        y = boxes[..., 1::2].clamp(0, self.signature.canvas_height)
        boxes = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)
        nonempty = (x[..., 1] > x[..., 0]) & (y[..., 1] > y[..., 0])
        scores, order = torch.where(nonempty, scores, torch.zeros_like(scores)).topk(scores.shape[1], dim=1)
        exists = scores > 0
        num_detections = exists.sum(dim=1, keepdim=True).int()
        return num_detections, rows(boxes, order) * exists[:, :, None], scores, labels.gather(1, order) * exists


def _check(detector: RetinaNet, signature: DetectorSignature) -> None:
    divisor = detector.backbone.size_divisibility
    height, width = signature.canvas_height, signature.canvas_width
    if divisor > 1 and (height % divisor or width % divisor):
        raise UnsupportedDetector(
            f"export: canvas {height} x {width} is not divisible by {divisor}, the backbone's size_divisibility; "
            f"the nearest that is: {-(-height // divisor) * divisor} x {-(-width // divisor) * divisor}"
        )
    if detector.num_classes != len(signature.class_names):
        raise UnsupportedDetector(
            f"export: the detector has {detector.num_classes} classes but the signature names "
            f"{len(signature.class_names)}; both must come from the same data set"
        )
