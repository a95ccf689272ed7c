"""One tiny detector of every family that can be trained with LGD, and labelled batches for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from dense_detectors import DENSE
from detectron2.structures import Boxes, Instances, PolygonMasks
from two_stage_detectors import tiny_faster_rcnn, tiny_mask_rcnn

NUM_CLASSES = 5
IMAGE_SIZE = (128, 160)
"""Of all images here, and of the padded batch: FPN pads to multiples of 32."""

BOXES = [[8.0, 12.0, 70.0, 60.0], [64.0, 20.0, 150.0, 120.0], [20.0, 70.0, 52.0, 110.0]]
CLASSES = [1, 4, 0]


DETECTORS = {**DENSE, "Faster R-CNN": tiny_faster_rcnn, "Mask R-CNN": tiny_mask_rcnn}


def labelled(boxes: list[list[float]] | None = None, classes: list[int] | None = None) -> Instances:
    """Labels of an image; each object's mask is the hexagon that its box's corners are cut off to."""
    boxes = BOXES if boxes is None else boxes
    classes = CLASSES[: len(boxes)] if classes is None else classes
    polygons = []
    for x1, y1, x2, y2 in boxes:
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        polygons.append([np.array([x1, y, x, y1, x2, y1, x2, y, x, y2, x1, y2])])
    instances = Instances(IMAGE_SIZE)
    instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    if boxes:  # detectron2's mapper leaves the field out of images without objects
        instances.gt_masks = PolygonMasks(polygons)
    return instances


def batch(*labels: Instances, seed: int = 0) -> list[dict[str, Any]]:
    """An input of noise for each image's labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"image": torch.randint(0, 256, (3, *IMAGE_SIZE), dtype=torch.uint8, generator=generator), "instances": each}
        for each in labels
    ]
