"""Lazy model trees of one-stage detectors that recipes start from and change."""

from __future__ import annotations

from typing import Any

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead

from pipeline.recipe_parts.backbones import IMAGENET_RGB, Pixels

LEVELS = ["p3", "p4", "p5", "p6", "p7"]


def retinanet(
    bottom_up: Any,
    *,
    channels: int = 256,
    num_head_convs: int = 4,
    smallest_anchor_pixels: int = 32,
    head_norm: str = "",
    pixels: Pixels = IMAGENET_RGB,
) -> Any:
    """Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, as detectron2 builds it: pyramid levels p3 to p7,
    nine anchors a location, three octave scales from ``smallest_anchor_pixels`` on p3 doubling with each level.

    Args:
        bottom_up: lazy call of a network with outputs ``res3``, ``res4``, ``res5``.
        channels: of the pyramid and the head.
        num_head_convs: 3x3 convolutions in each of the head's two towers.
        pixels: channel order, mean and deviation that the network below wants.
    """
    sizes = [
        [smallest_anchor_pixels * 2 ** (level + octave / 3) for octave in range(3)] for level in range(len(LEVELS))
    ]
    return L(RetinaNet)(
        backbone=L(FPN)(
            bottom_up=bottom_up,
            in_features=["res3", "res4", "res5"],
            out_channels=channels,
            top_block=L(LastLevelP6P7)(in_channels=channels, out_channels=channels, in_feature="p5"),
        ),
        head=L(RetinaNetHead)(
            input_shape=[ShapeSpec(channels=channels)] * len(LEVELS),
            num_classes="${..num_classes}",
            conv_dims=[channels] * num_head_convs,
            prior_prob=0.01,
            num_anchors=9,
            norm=head_norm,
        ),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=sizes, aspect_ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128], offset=0.0
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        anchor_matcher=L(Matcher)(thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True),
        num_classes=80,
        head_in_features=LEVELS,
        focal_loss_alpha=0.25,
        focal_loss_gamma=2.0,
        pixel_mean=list(pixels.mean),
        pixel_std=list(pixels.std),
        input_format=pixels.input_format,
        test_score_thresh=0.05,
        test_topk_candidates=1000,
        test_nms_thresh=0.5,
        max_detections_per_image=100,
        vis_period=0,
    )
