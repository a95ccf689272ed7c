"""Narrow two-stage detectors with random weights, on the trunk of the tiny RetinaNet."""

from __future__ import annotations

from typing import Any

from conftest import tiny_bottom_up
from torch import nn

from pipeline.recipe_parts.two_stage import faster_rcnn, mask_rcnn
from training.student import build_student


def faster_rcnn_tree(*, num_proposals: int = 50) -> Any:
    return faster_rcnn(tiny_bottom_up(*_STAGES), num_proposals=num_proposals, **_SIZES)


def mask_rcnn_tree(*, num_proposals: int = 50) -> Any:
    return mask_rcnn(tiny_bottom_up(*_STAGES), num_proposals=num_proposals, mask_head_channels=[16, 16], **_SIZES)


def tiny_faster_rcnn(num_classes: int = 5) -> nn.Module:
    return build_student(faster_rcnn_tree(), num_classes, seed=0).eval()


def tiny_mask_rcnn(num_classes: int = 5) -> nn.Module:
    return build_student(mask_rcnn_tree(), num_classes, seed=0).eval()


_STAGES = ("res2", "res3", "res4", "res5")
_SIZES: dict[str, Any] = {"channels": 32, "smallest_anchor_pixels": 16, "box_head_channels": [32]}
