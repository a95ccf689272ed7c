"""Lazy calls of the networks below a pyramid, and how each wants its pixels."""

from __future__ import annotations

from typing import Any, NamedTuple

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet

from training.backbones.timm_backbone import TimmBackbone


class Pixels(NamedTuple):
    """What a network's pretrained weights expect: channel order, and the mean and deviation of each channel."""

    input_format: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET_RGB = Pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
CAFFE_BGR = Pixels("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
RESNEXT_BGR = Pixels("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395))


def resnet(depth: int, *, norm: str = "FrozenBN") -> Any:
    """detectron2's ResNet as a lazy call; outputs ``res3`` to ``res5``."""
    return L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm=norm),
        stages=L(ResNet.make_default_stages)(depth=depth, norm=norm),
        out_features=["res3", "res4", "res5"],
    )


def timm_backbone(name: str, *, weights: str | None, freeze_norm: bool = False) -> Any:
    """A timm feature extractor as a lazy call; outputs ``res3`` to ``res5``."""
    return L(TimmBackbone)(name=name, weights=weights, freeze_norm=freeze_norm)
