"""One tiny detector of each dense family, all on the trunk and pyramid of the tiny RetinaNet."""

from __future__ import annotations

import torch
from conftest import build_tiny_retinanet
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

from training.detectors.atss_matcher import AtssMatcher
from training.detectors.distribution_retinanet import DistributionRetinaNet, DistributionRetinaNetHead
from training.detectors.fcos_matcher import FcosMatcher
from training.detectors.gfl_detector import GflDetector
from training.detectors.location_detector import LocationDetector
from training.detectors.location_head import GflHead, LocationHead
from training.detectors.locations import Match
from training.detectors.stock_fcos import stock_fcos

LEVELS = ["p3", "p4", "p5", "p6", "p7"]
CHANNELS = 32
REG_MAX = 8
PIXELS = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375], "input_format": "RGB"}


def tiny_fcos(num_classes: int = 5) -> FCOS:
    backbone = build_tiny_retinanet(num_classes, CHANNELS).backbone
    shapes = [ShapeSpec(channels=CHANNELS)] * len(LEVELS)
    return stock_fcos(
        backbone=backbone,
        head=FCOSHead(input_shape=shapes, num_classes=num_classes, conv_dims=[CHANNELS]),
        head_in_features=LEVELS,
        num_classes=num_classes,
        **PIXELS,
    ).eval()


def tiny_paper_fcos(num_classes: int = 5) -> LocationDetector:
    return _location_detector(num_classes, FcosMatcher(), box_loss_weight=1.0)


def tiny_atss(num_classes: int = 5) -> LocationDetector:
    return _location_detector(num_classes, AtssMatcher(), box_loss_weight=2.0)


def tiny_distribution_fcos(num_classes: int = 5) -> LocationDetector:
    return _location_detector(num_classes, FcosMatcher(), box_loss_weight=1.0, reg_max=REG_MAX)


def tiny_distribution_atss(num_classes: int = 5) -> LocationDetector:
    return _location_detector(num_classes, AtssMatcher(), box_loss_weight=2.0, reg_max=REG_MAX)


def tiny_gfl(num_classes: int = 5) -> GflDetector:
    backbone = build_tiny_retinanet(num_classes, CHANNELS).backbone
    torch.manual_seed(1)
    return GflDetector(
        backbone=backbone,
        head=GflHead(channels=CHANNELS, num_classes=num_classes, num_convs=1, norm_groups=8, reg_max=REG_MAX),
        head_in_features=LEVELS,
        matcher=AtssMatcher(),
        num_classes=num_classes,
        **PIXELS,
    ).eval()


def tiny_distribution_retinanet(num_classes: int = 5) -> DistributionRetinaNet:
    stock = build_tiny_retinanet(num_classes, CHANNELS)
    shapes = [ShapeSpec(channels=CHANNELS)] * len(LEVELS)
    torch.manual_seed(1)
    return DistributionRetinaNet(
        backbone=stock.backbone,
        head=DistributionRetinaNetHead(
            input_shape=shapes, num_classes=num_classes, num_anchors=9, conv_dims=[CHANNELS], reg_max=REG_MAX
        ),
        head_in_features=LEVELS,
        anchor_generator=stock.anchor_generator,
        anchor_matcher=stock.anchor_matcher,
        num_classes=num_classes,
        **PIXELS,
    ).eval()


DENSE = {
    "RetinaNet": build_tiny_retinanet,
    "FCOS": tiny_fcos,
    "PaperFCOS": tiny_paper_fcos,
    "ATSS": tiny_atss,
    "GFL": tiny_gfl,
    "DistributionRetinaNet": tiny_distribution_retinanet,
    "DistributionATSS": tiny_distribution_atss,
}


def _location_detector(
    num_classes: int, matcher: Match, *, box_loss_weight: float, reg_max: int | None = None
) -> LocationDetector:
    backbone = build_tiny_retinanet(num_classes, CHANNELS).backbone
    torch.manual_seed(1)
    return LocationDetector(
        backbone=backbone,
        head=LocationHead(channels=CHANNELS, num_classes=num_classes, num_convs=1, norm_groups=8, reg_max=reg_max),
        head_in_features=LEVELS,
        matcher=matcher,
        num_classes=num_classes,
        box_loss_weight=box_loss_weight,
        **PIXELS,
    ).eval()
