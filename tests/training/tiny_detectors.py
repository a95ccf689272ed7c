"""One tiny detector of every family that can be trained with LGD, and labelled batches for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from dense_detectors import DENSE
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.structures import Boxes, Instances, PolygonMasks
from torch import nn

from pipeline.recipe_parts.two_stage import faster_rcnn, mask_rcnn
from training.student import build_student

NUM_CLASSES = 5
IMAGE_SIZE = (128, 160)
"""Of all images here, and of the padded batch: FPN pads to multiples of 32."""

BOXES = [[8.0, 12.0, 70.0, 60.0], [64.0, 20.0, 150.0, 120.0], [20.0, 70.0, 52.0, 110.0]]
CLASSES = [1, 4, 0]


def tiny_faster_rcnn() -> nn.Module:
    return _two_stage(faster_rcnn(_bottom_up(), **_SIZES))


def tiny_mask_rcnn() -> nn.Module:
    return _two_stage(mask_rcnn(_bottom_up(), mask_head_channels=[16, 16], **_SIZES))


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


_SIZES: dict[str, Any] = {
    "channels": 32, "smallest_anchor_pixels": 16, "num_proposals": 50, "box_head_channels": [32],
}  # fmt: skip


def _two_stage(tree: Any) -> nn.Module:
    return build_student(tree, num_classes=NUM_CLASSES, seed=0).eval()


def _bottom_up() -> Any:
    """Lazy call of a ResNet of one basic block a stage."""
    return L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=16, norm="FrozenBN"),
        stages=[
            L(ResNet.make_stage)(
                block_class=BasicBlock, num_blocks=1, stride_per_block=[s], in_channels=i, out_channels=o,
                norm="FrozenBN",
            )
            for i, o, s in ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 80, 2))
        ],
        out_features=["res2", "res3", "res4", "res5"],
    )  # fmt: skip
