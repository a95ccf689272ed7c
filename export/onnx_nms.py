"""Greedy class-wise NMS as the ONNX operator ``NonMaxSuppression``, with the same fixed output shape.

The operator's list of selected boxes has as many rows as it finds. Here it never leaves as a list: the selected scores
are scattered into zeros, and the best R of them are taken, so every other shape of the graph is static.

In ONNX Runtime on a CPU the result equals that of :mod:`export.nms`, ties included: at most R boxes a class are asked
for, and no more than R of a class can be among the best R. TensorRT's parser makes an ``INMSLayer`` of the operator,
which is TensorRT's own NMS since the EfficientNMS plugin is deprecated. That was not run here; by its documentation the
layer looks at the 5,000 best boxes of an image and leaves open which of equal scores comes first. TensorRT-RTX 1.7
parses the layer and has no implementation of it.

Shape legend: N images, C candidates, K classes, R detection slots, S selected boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20 as op
from torch import Tensor

from export.candidate_nms import largest_float32_up_to
from export.nms import greedy_nms, rows

torch.library.define(
    "detector::selected_scores",
    "(Tensor boxes, Tensor scores, Tensor class_scores, float iou_threshold, int max_detections) -> Tensor",
)


def onnx_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, num_classes: int, iou_threshold: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`export.nms.greedy_nms` gives, which runs in its place where the graph is not being exported.

    Args:
        boxes, scores, labels, iou_threshold, max_detections: see there.
        num_classes: K, more than the largest label.
    """
    if not torch.compiler.is_exporting():
        return greedy_nms(boxes, scores, labels, iou_threshold=iou_threshold, max_detections=max_detections)
    missing = max(0, max_detections - scores.shape[1])
    if missing:
        boxes = torch.nn.functional.pad(boxes, (0, 0, 0, missing))
        scores, labels = (torch.nn.functional.pad(values, (0, missing)) for values in (scores, labels))
    classes = torch.arange(num_classes, dtype=labels.dtype, device=labels.device)[:, None]
    class_scores = torch.where(labels[:, None] == classes, scores[:, None], torch.zeros_like(scores[:, None]))
    selected = torch.ops.detector.selected_scores(
        boxes, scores, class_scores, largest_float32_up_to(iou_threshold), max_detections
    )
    kept_scores, top = selected.topk(max_detections, dim=1)
    exists = kept_scores > 0
    return rows(boxes, top) * exists[:, :, None], kept_scores, labels.gather(1, top) * exists


@torch.library.register_fake("detector::selected_scores")
def _selected_scores(
    boxes: Tensor, scores: Tensor, class_scores: Tensor, iou_threshold: float, max_detections: int
) -> Tensor:
    """Boxes (N, C, 4), scores (N, C), and (N, K, C) with each score in the row of its class → the scores that stay."""
    return torch.empty_like(scores)


def _selected_scores_in_onnx(
    boxes: Any, scores: Any, class_scores: Any, iou_threshold: float, max_detections: int
) -> Any:
    """The same in ONNX, with the operator's ``selected_indices`` (S, 3): image, class, box."""
    selected = op.NonMaxSuppression(
        boxes,
        class_scores,
        op.Constant(value_ints=[max_detections]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[0.0]),
    )
    box_of_image = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
    return op.ScatterND(op.Sub(scores, scores), box_of_image, op.GatherND(scores, box_of_image))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.detector.selected_scores.default: _selected_scores_in_onnx
}
"""What :func:`torch.onnx.export` needs to write the operator."""
