"""The input and output promise of an exported detector, as data.

Everything that has to agree with the graph derives from :class:`DetectorSignature`: ``config.pbtxt``, TensorRT
profiles, the client's preprocessing and the parity harness. Only numpy is imported here, because serving runs without
torch.

Shape legend: N images, R detection slots an image, H x W the canvas.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

SIGNATURE_FILE = "signature.json"

DType = Literal["float32", "int32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detections:
    """The detections of one image.

    Attributes:
        boxes: (M, 4) float32, xyxy in pixels of whatever image the context names.
        scores: (M,) float32 in [0, 1], descending.
        labels: (M,) int32, contiguous class indices.
        masks: (M, S, S) float32 in [0, 1], the probability that a cell of the box, S x S of them, belongs to the
            object; None from a detector of boxes alone. ``serving.mask_pasting`` draws them into the image.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> Detections:
        """The detections whose score is greater than ``score``."""
        return self.where(self.scores > score)

    def where(self, keep: np.ndarray) -> Detections:
        """The detections that ``keep``, (M,) bool or positions, marks."""
        masks = None if self.masks is None else self.masks[keep]
        return Detections(boxes=self.boxes[keep], scores=self.scores[keep], labels=self.labels[keep], masks=masks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorSignature:
    """What goes into an exported detector and what comes out.

    The input is ``input_name``: uint8 (N, 3, H, W), an image resized so that its shortest edge is
    ``short_edge_pixels`` unless its longest would pass ``max_edge_pixels``, in ``channel_order``, top-left on the
    canvas, the rest filled with ``pad_value``. Mean and standard deviation are inside the graph.

    The outputs are ``num_detections`` (N, 1) int32, ``boxes`` (N, R, 4) float32 xyxy canvas pixels, ``scores`` (N, R)
    float32 descending, ``labels`` (N, R) int32 and, for instance segmentation, ``masks`` (N, R, S, S) float32 in
    [0, 1]; slots from ``num_detections`` on are zero.

    Attributes:
        canvas_height, canvas_width: H and W in pixels.
        short_edge_pixels, max_edge_pixels: detectron2's ``ResizeShortestEdge`` rule (bilinear, on uint8).
        pad_value: one value per channel, in ``channel_order``.
        max_batch_size: largest N; every N from 1 on is accepted.
        max_detections: R.
        score_threshold, nms_threshold: what the graph applies; recorded for clients, not an input.
        class_names: name of each label.
        category_ids: the data set's category id of each label.
        mask_size: S, cells along the edge of a mask; None: no masks.
    """

    canvas_height: int
    canvas_width: int
    short_edge_pixels: int
    max_edge_pixels: int
    channel_order: Literal["RGB", "BGR"]
    pad_value: tuple[int, int, int]
    max_batch_size: int
    max_detections: int
    score_threshold: float
    nms_threshold: float
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    input_name: str = "images"
    mask_size: int | None = None

    def __post_init__(self) -> None:
        for field in ("pad_value", "class_names", "category_ids"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.channel_order not in ("RGB", "BGR"):
            raise ValueError(f"signature: channel_order is {self.channel_order!r}, expected 'RGB' or 'BGR'")
        if len(self.class_names) != len(self.category_ids):
            raise ValueError(
                f"signature: {len(self.class_names)} class names but {len(self.category_ids)} category ids; "
                "there must be one id for each name"
            )
        if self.max_batch_size < 1 or self.max_detections < 1:
            raise ValueError("signature: max_batch_size and max_detections must be at least 1")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one input image, (3, H, W)."""
        return (3, self.canvas_height, self.canvas_width)

    @property
    def outputs(self) -> dict[str, tuple[DType, tuple[int, ...]]]:
        """Element type and shape of each output, the batch dimension left out, in the graph's order."""
        slots = self.max_detections
        outputs: dict[str, tuple[DType, tuple[int, ...]]] = {
            "num_detections": ("int32", (1,)),
            "boxes": ("float32", (slots, 4)),
            "scores": ("float32", (slots,)),
            "labels": ("int32", (slots,)),
        }
        if self.mask_size is not None:
            outputs["masks"] = ("float32", (slots, self.mask_size, self.mask_size))
        return outputs

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs in the graph's order."""
        return tuple(self.outputs)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DetectorSignature:
        return cls(**json.loads(text))

    def write(self, directory: Path) -> Path:
        path = directory / SIGNATURE_FILE
        path.write_text(self.to_json())
        return path

    @classmethod
    def read(cls, directory: Path) -> DetectorSignature:
        return cls.from_json((directory / SIGNATURE_FILE).read_text())

    def check_images(self, images: np.ndarray) -> None:
        """Raise ``ValueError`` unless ``images`` is what the graph takes."""
        if images.dtype != np.uint8:
            raise ValueError(f"{self.input_name}: found dtype {images.dtype}, expected uint8")
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise ValueError(
                f"{self.input_name}: found shape {images.shape}, expected (N, {str(self.image_shape)[1:]}; "
                "resize and pad with serving.preprocessing.canvas_from_image"
            )
        if not 1 <= len(images) <= self.max_batch_size:
            raise ValueError(f"{self.input_name}: found batch {len(images)}, expected 1 to {self.max_batch_size}")


def detections_from_outputs(outputs: Mapping[str, np.ndarray]) -> list[Detections]:
    """Split the graph's batched outputs into one :class:`Detections` an image, without the empty slots.

    Args:
        outputs: the arrays by name; without ``masks`` from a detector of boxes alone.
    """
    masks = outputs.get("masks")
    return [
        Detections(
            boxes=outputs["boxes"][i, :count],
            scores=outputs["scores"][i, :count],
            labels=outputs["labels"][i, :count],
            masks=None if masks is None else masks[i, :count],
        )
        for i, count in enumerate(outputs["num_detections"][:, 0].tolist())
    ]
