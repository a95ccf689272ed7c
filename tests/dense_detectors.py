"""One tiny detector of each dense family, all on the trunk and pyramid of the tiny RetinaNet."""

from __future__ import annotations

import torch
from conftest import build_tiny_retinanet
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from torch import nn

from training.detectors.atss import ATSS
from training.detectors.location_head import LocationHead
from training.detectors.paper_fcos import PaperFCOS
from training.detectors.stock_fcos import stock_fcos

LEVELS = ["p3", "p4", "p5", "p6", "p7"]
CHANNELS = 32


def tiny_fcos(num_classes: int = 5) -> FCOS:
    backbone = build_tiny_retinanet(num_classes, CHANNELS).backbone
    shapes = [ShapeSpec(channels=CHANNELS)] * len(LEVELS)
    return stock_fcos(
        backbone=backbone,
        head=FCOSHead(input_shape=shapes, num_classes=num_classes, conv_dims=[CHANNELS]),
        head_in_features=LEVELS,
        num_classes=num_classes,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
        input_format="RGB",
    ).eval()


def tiny_paper_fcos(num_classes: int = 5) -> PaperFCOS:
    return PaperFCOS(
        backbone=build_tiny_retinanet(num_classes, CHANNELS).backbone,
        head=_head(num_classes),
        head_in_features=LEVELS,
        num_classes=num_classes,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
        input_format="RGB",
    ).eval()


def tiny_atss(num_classes: int = 5) -> ATSS:
    return ATSS(
        backbone=build_tiny_retinanet(num_classes, CHANNELS).backbone,
        head=_head(num_classes),
        head_in_features=LEVELS,
        num_classes=num_classes,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
        input_format="RGB",
    ).eval()


DENSE = {"RetinaNet": build_tiny_retinanet, "FCOS": tiny_fcos, "PaperFCOS": tiny_paper_fcos, "ATSS": tiny_atss}


def _head(num_classes: int) -> nn.Module:
    torch.manual_seed(1)
    return LocationHead(channels=CHANNELS, num_classes=num_classes, num_convs=1, norm_groups=8)
