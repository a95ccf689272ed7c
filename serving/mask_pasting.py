"""A detection's mask, S x S probabilities in its box, drawn into the image as detectron2 does. Numpy only.

A pixel belongs to the object where the mask, interpolated at the pixel's centre, is at least 0.5; outside the mask's
outermost cells it falls off to zero. Interpolation is separable, so it is two small matrix products.

Shape legend: H x W the image, S cells along a mask's edge, M detections.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

import numpy as np

from export.signature import Detections

THRESHOLD = 0.5


class RunLengths(TypedDict):
    """COCO's uncompressed run-length encoding: ``size`` is (H, W), ``counts`` are the lengths of the runs of zeros and
    ones, in turn and beginning with zeros, down the columns."""

    size: list[int]
    counts: list[int]


def masks_in_image(detections: Detections, height: int, width: int) -> Iterator[np.ndarray]:
    """Each detection's pixels in an image, (H, W) bool; nothing where the detector draws no masks.

    Args:
        detections: boxes in pixels of the image (:func:`serving.preprocessing.detections_in_image`).
    """
    if detections.masks is not None:
        for mask, box in zip(detections.masks, detections.boxes, strict=True):
            yield mask_in_image(mask, box, height, width)


def mask_in_image(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draw one mask, (S, S) in [0, 1] in a box xyxy in pixels, into an image: (H, W) bool."""
    x1, y1, x2, y2 = (np.float32(edge) for edge in box)
    left, right = max(int(np.floor(x1)) - 1, 0), min(int(np.ceil(x2)) + 1, width)
    top, bottom = max(int(np.floor(y1)) - 1, 0), min(int(np.ceil(y2)) + 1, height)
    columns = (np.arange(left, right, dtype=np.float32) + np.float32(0.5) - x1) / (x2 - x1)
    rows = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5) - y1) / (y2 - y1)
    drawn = np.zeros((height, width), dtype=bool)
    drawn[top:bottom, left:right] = _interpolated(mask, rows, columns) >= THRESHOLD
    return drawn


def cropped_mask(mask: np.ndarray, box: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The mask, (S, S), of a box's ``part``, which lies within it; both xyxy."""
    size = len(mask)
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    extent, offset = (part[2:] - part[:2]) / (box[2:] - box[:2]), (part[:2] - box[:2]) / (box[2:] - box[:2])
    # Beyond the outermost cells' centres the mask is what it is there: the border of the box is not the object's.
    columns, rows = (np.clip(offset[i] + centres * extent[i], 0.5 / size, 1 - 0.5 / size) for i in (0, 1))
    return _interpolated(mask, rows, columns).astype(np.float32)


def run_lengths(mask: np.ndarray) -> RunLengths:
    """Encode an (H, W) bool mask."""
    pixels = mask.flatten(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [len(pixels)]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}


def _interpolated(mask: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The mask at every (row, column), each from 0 to 1 along the box's edge."""
    return _weights(rows, len(mask)) @ mask.astype(np.float32) @ _weights(columns, len(mask)).T


def _weights(position: np.ndarray, num_cells: int) -> np.ndarray:
    """What each cell contributes at each position: (positions, S)."""
    # As grid_sample computes it, by way of coordinates from -1 to 1, so that rounding falls the same way.
    cell = ((position * 2 - 1 + 1) * num_cells - 1) / 2
    distance = np.abs(cell[:, None] - np.arange(num_cells, dtype=np.float32))
    return np.maximum(np.float32(1) - distance, np.float32(0))
