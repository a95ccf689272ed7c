"""NMS outside the graph: candidates → the outputs that a graph with NMS inside gives, in numpy.

The same greedy class-wise NMS as :func:`export.nms.greedy_nms`, bit for bit. It runs in the runner, or in Triton's
Python backend, which gets a copy of this file beside the model: so only numpy is imported here and nothing of this
project.

Shape legend: N images, C candidates, R detection slots, W the window, A and B boxes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

CANDIDATES = ("candidate_boxes", "candidate_scores", "candidate_labels")
"""The outputs of a model file that ends before NMS, in their order."""

WINDOW = 128
TINY = float(np.finfo(np.float32).tiny)


def candidate_outputs(num_candidates: int) -> dict[str, tuple[Literal["float32", "int32"], tuple[int, ...]]]:
    """Element type and shape of each of ``CANDIDATES``, the batch dimension left out; boxes are xyxy canvas pixels."""
    boxes, scores, labels = CANDIDATES
    return {
        boxes: ("float32", (num_candidates, 4)),
        scores: ("float32", (num_candidates,)),
        labels: ("int32", (num_candidates,)),
    }


def outputs_from_candidates(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    iou_threshold: float,
    max_detections: int,
    canvas_height: int,
    canvas_width: int,
) -> dict[str, np.ndarray]:
    """NMS, and what follows it in a graph: clip to the canvas and drop what becomes empty.

    Args:
        boxes: (N, C, 4) float32 xyxy.
        scores: (N, C) float32; a candidate with score <= 0 does not exist.
        labels: (N, C) int32.
        iou_threshold: a box is dropped where its IoU with a kept box of its class is greater.
        max_detections: R.

    Returns:
        ``num_detections``, ``boxes``, ``scores`` and ``labels`` as the signature says.
    """
    num_images = len(scores)
    outputs = {
        "num_detections": np.zeros((num_images, 1), np.int32),
        "boxes": np.zeros((num_images, max_detections, 4), np.float32),
        "scores": np.zeros((num_images, max_detections), np.float32),
        "labels": np.zeros((num_images, max_detections), np.int32),
    }
    limits = np.array([canvas_width, canvas_height] * 2, np.float32)
    for image in range(num_images):
        kept = _kept(boxes[image], scores[image], labels[image], iou_threshold, max_detections)
        on_canvas = boxes[image][kept].clip(0, limits)
        nonempty = (on_canvas[:, 2:] > on_canvas[:, :2]).all(axis=1)
        kept, count = kept[nonempty], int(nonempty.sum())
        outputs["num_detections"][image] = count
        outputs["boxes"][image, :count] = on_canvas[nonempty]
        outputs["scores"][image, :count] = scores[image][kept]
        outputs["labels"][image, :count] = labels[image][kept]
    return outputs


def largest_float32_up_to(value: float) -> float:
    """``x > value`` for float32 x, as torchvision compares it in float64, is ``x > this`` in float32."""
    rounded = np.float32(value)
    return float(rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(-1)))


def _kept(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou_threshold: float, max_detections: int
) -> np.ndarray:
    """Positions of the boxes of one image that stay, by falling score; of equal scores the first comes first."""
    threshold = np.float32(largest_float32_up_to(iou_threshold))

    def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (_iou(boxes[a], boxes[b]) > threshold) & (labels[a][:, None] == labels[b])

    existing = np.flatnonzero(scores > 0)
    order = existing[np.argsort(-scores[existing], kind="stable")]
    kept = order[:0]
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        window = window[~overlap(kept, window).any(axis=0)]
        within = overlap(window, window)
        free = np.ones(len(window), dtype=bool)
        for i in range(len(window)):
            if free[i]:
                free[i + 1 :] &= ~within[i, i + 1 :]
        kept = np.concatenate([kept, window[free]])
        if len(kept) >= max_detections:
            break
    return kept[:max_detections]


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every box of (A, 4) with every box of (B, 4), in the order of operations of :mod:`export.nms`."""
    ax1, ay1, ax2, ay2 = a.T[:, :, None]
    bx1, by1, bx2, by2 = b.T
    width = (np.minimum(ax2, bx2) - np.maximum(ax1, bx1)).clip(min=0)
    height = (np.minimum(ay2, by2) - np.maximum(ay1, by1)).clip(min=0)
    intersection = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
    return intersection / union.clip(min=TINY)
