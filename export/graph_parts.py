"""What the export graphs of all families share.

Shape legend: N images, R detection slots.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from export.config import NmsChoice
from export.nms import greedy_nms, rows
from export.onnx_nms import onnx_nms
from export.signature import DetectorSignature

HEAD_PREFIX = "head/"
Outputs = tuple[Tensor, ...]


def named_levels(names: Sequence[str], outputs: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """A head's outputs, each a list over levels, as ``head/<name>/<level>``, the finest level being 0."""
    return {
        f"{HEAD_PREFIX}{name}/{level}": tensor
        for name, levels in zip(names, outputs, strict=True)
        for level, tensor in enumerate(levels)
    }


class DetectorGraph(nn.Module, abc.ABC):
    """An export graph: uint8 canvases (N, 3, H, W) → the signature's outputs in their order.

    Attributes:
        head_tensor_names: what the outputs of the detector's head are, in their order.
    """

    head_tensor_names: tuple[str, ...]

    def forward(self, images: Tensor) -> Outputs:
        """See :func:`export.detector_graph.detector_graph`."""
        return self.with_head_tensors(images)[0]

    @abc.abstractmethod
    def with_head_tensors(self, images: Tensor) -> tuple[Outputs, dict[str, Tensor]]:
        """The same, and what the head predicts on each level, before anything is ranked or decoded.

        The names are those of :func:`named_levels`; in an exported file they are the names of the values.
        """


class Nms(Protocol):
    """Greedy class-wise NMS of a batch, as :func:`export.nms.greedy_nms` describes it."""

    def __call__(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, *, iou_threshold: float, max_detections: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def nms_of(choice: NmsChoice, num_classes: int) -> Nms | None:
    """The NMS that a graph ends with; None: it ends before."""
    if choice == "outside":
        return None
    return greedy_nms if choice == "portable" else functools.partial(onnx_nms, num_classes=num_classes)


class InferenceSettings(NamedTuple):
    """How a detector turns predictions into detections.

    Attributes:
        num_classes: K.
        num_candidates: the largest top-k that the graph takes.
        score_threshold, nms_threshold: what a detection passes.
        max_detections: R.
        mask_size: cells along the edge of a mask; None for a detector of boxes alone.
    """

    num_classes: int
    num_candidates: int
    score_threshold: float
    nms_threshold: float
    max_detections: int
    mask_size: int | None = None


def boxes_from_deltas(deltas: Tensor, boxes: Tensor, weights: Sequence[float], scale_clamp: float) -> Tensor:
    """detectron2's ``Box2BoxTransform.apply_deltas``, operation for operation, on (…, 4) deltas and xyxy boxes."""
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + 0.5 * size
    deltas = deltas.float() / deltas.new_tensor(weights, dtype=torch.float32)
    centre = deltas[..., :2] * size + centre
    size = deltas[..., 2:].clamp(max=scale_clamp).exp() * size
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def ended(
    boxes: Tensor, scores: Tensor, labels: Tensor, nms: Nms | None, signature: DetectorSignature
) -> tuple[Tensor, ...]:
    """The end of a graph: NMS of the candidates and :func:`on_canvas`, or the candidates where NMS is outside."""
    if nms is None:
        return boxes, scores, labels
    kept = nms(boxes, scores, labels, iou_threshold=signature.nms_threshold, max_detections=signature.max_detections)
    return on_canvas(*kept, signature)


def on_canvas(
    boxes: Tensor, scores: Tensor, labels: Tensor, signature: DetectorSignature
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clip to the canvas, drop what becomes empty (``detector_postprocess``) and close the gaps.

    Args:
        boxes: (N, R, 4) float32 xyxy.
        scores: (N, R) float32 descending; 0 marks an empty slot.
        labels: (N, R) int32.

    Returns:
        ``num_detections`` (N, 1) int32, boxes, scores, labels as the signature says.
    """
    x = boxes[..., 0::2].clamp(0, signature.canvas_width)
    y = boxes[..., 1::2].clamp(0, signature.canvas_height)
    boxes = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)
    nonempty = (x[..., 1] > x[..., 0]) & (y[..., 1] > y[..., 0])
    scores, order = torch.where(nonempty, scores, torch.zeros_like(scores)).topk(scores.shape[1], dim=1)
    exists = scores > 0
    num_detections = exists.sum(dim=1, keepdim=True).int()
    return num_detections, rows(boxes, order) * exists[:, :, None], scores, labels.gather(1, order) * exists
