"""Fixtures that more than one package's tests use."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead


def tiny_bottom_up(*out_features: str) -> Any:
    """Lazy call of a narrow ResNet with one basic block a stage."""
    stages = [
        L(ResNet.make_stage)(
            block_class=BasicBlock, num_blocks=1, stride_per_block=[s], in_channels=i, out_channels=o, norm="FrozenBN"
        )
        for i, o, s in ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 80, 2))
    ]
    stem = L(BasicStem)(in_channels=3, out_channels=16, norm="FrozenBN")
    return L(ResNet)(stem=stem, stages=stages, out_features=list(out_features))


def build_tiny_retinanet(num_classes: int = 5, channels: int = 32, seed: int = 0) -> RetinaNet:
    """A stock detectron2 RetinaNet with a narrow trunk and pyramid; random weights, CPU, eval mode."""
    torch.manual_seed(seed)
    model = L(RetinaNet)(
        backbone=L(FPN)(
            bottom_up=tiny_bottom_up("res3", "res4", "res5"),
            in_features=["res3", "res4", "res5"],
            out_channels=channels,
            top_block=L(LastLevelP6P7)(in_channels=80, out_channels=channels),
        ),
        head=L(RetinaNetHead)(
            input_shape=[ShapeSpec(channels=channels)] * 5, num_classes="${..num_classes}",
            conv_dims=[channels, channels], prior_prob=0.01, num_anchors=9,
        ),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[s, s * 2 ** (1 / 3), s * 2 ** (2 / 3)] for s in (16, 32, 64, 128, 256)],
            aspect_ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128], offset=0.0,
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        anchor_matcher=L(Matcher)(thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True),
        num_classes=num_classes,
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
        input_format="RGB",
        vis_period=0,
    )  # fmt: skip
    return instantiate(model).eval()


def hear_ctrl_c() -> None:
    """``preexec_fn`` of a child that gets a SIGINT: a shell's background job starts with that signal ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def tiny_retinanet() -> RetinaNet:
    return build_tiny_retinanet()
