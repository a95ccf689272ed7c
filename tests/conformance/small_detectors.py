"""A small detector of every family that is exported on every backbone, with random weights that detect.

The trees are those of the recipes; only channels and numbers of layers are smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import nn

from pipeline.recipe_parts import atss, faster_rcnn, fcos, gfl, mask_rcnn, paper_fcos, retinanet, timm_backbone
from tests.calibration import calibrate
from tests.export.conftest import CLASS_NAMES, canvases
from training.backbones.deformable import DeformableBottleneckBlock
from training.backbones.swin import Swin
from training.student import build_student

CANVAS = (128, 192)
CHANNELS = 32  # of the pyramid; not 16 or less, which fp8 leaves out
STAGES = ("res2", "res3", "res4", "res5")


class Bottom(NamedTuple):
    """A lazy call of the network below the pyramid, and its outputs of strides 4, 8, 16 and 32."""

    tree: Any
    features: tuple[str, ...] = STAGES


def _resnet(block: type, num_blocks: tuple[int, ...], **bottleneck: Any) -> Bottom:
    stages = [
        L(ResNet.make_stage)(
            block_class=BottleneckBlock if i == 0 and block is DeformableBottleneckBlock else block,
            num_blocks=number,
            stride_per_block=[1 if i == 0 else 2] + [1] * (number - 1),
            in_channels=24 if i == 0 else 32 * i,
            out_channels=32 * (i + 1),
            norm="FrozenBN",
            **bottleneck,
        )
        for i, number in enumerate(num_blocks)
    ]
    stem = L(BasicStem)(in_channels=3, out_channels=24, norm="FrozenBN")
    return Bottom(L(ResNet)(stem=stem, stages=stages, out_features=list(STAGES)))


def _swin() -> Bottom:
    features = ("p0", "p1", "p2", "p3")
    return Bottom(L(Swin)(embed_dim=24, depths=[2, 2, 2, 1], num_heads=[1, 2, 2, 4]), features)


def _timm(name: str) -> Bottom:
    return Bottom(timm_backbone(name, weights=None, out_features=STAGES))


BACKBONES: dict[str, Callable[[], Bottom]] = {
    "ResNet-18": lambda: _resnet(BasicBlock, (2, 2, 2, 2)),
    "ResNet-50": lambda: _resnet(BottleneckBlock, (3, 4, 6, 3), bottleneck_channels=24),
    "ResNeXt": lambda: _resnet(BottleneckBlock, (1, 2, 2, 1), bottleneck_channels=64, num_groups=2),
    "DCNv2": lambda: _resnet(DeformableBottleneckBlock, (1, 1, 2, 1), bottleneck_channels=48, num_groups=2),
    "Swin": _swin,
    "ConvNeXt": lambda: _timm("test_convnext"),
    "MobileNetV2": lambda: _timm("mobilenetv2_050"),
}
_DENSE: dict[str, Any] = {"channels": CHANNELS, "num_head_convs": 1}
_LOCATION: dict[str, Any] = {**_DENSE, "norm_groups": 8}
_TWO_STAGE: dict[str, Any] = {
    "channels": CHANNELS,
    "smallest_anchor_pixels": 16,
    "num_proposals": 100,
    "box_head_channels": [64],
}
FAMILIES: dict[str, Callable[[Bottom], Any]] = {
    "RetinaNet": lambda b: retinanet(b.tree, bottom_up_features=b.features[1:], smallest_anchor_pixels=16, **_DENSE),
    "DistributionRetinaNet": lambda b: retinanet(
        b.tree, bottom_up_features=b.features[1:], smallest_anchor_pixels=16, reg_max=8, **_DENSE
    ),
    "FCOS": lambda b: fcos(b.tree, bottom_up_features=b.features[1:], head_norm="", **_DENSE),
    "PaperFCOS": lambda b: paper_fcos(b.tree, bottom_up_features=b.features[1:], **_LOCATION),
    "ATSS": lambda b: atss(b.tree, bottom_up_features=b.features[1:], **_LOCATION),
    "GFL": lambda b: gfl(b.tree, bottom_up_features=b.features[1:], reg_max=8, **_LOCATION),
    "FasterRCNN": lambda b: faster_rcnn(b.tree, bottom_up_features=b.features, **_TWO_STAGE),
    "MaskRCNN": lambda b: mask_rcnn(
        b.tree, bottom_up_features=b.features, mask_head_channels=[CHANNELS, CHANNELS], **_TWO_STAGE
    ),
}


def small_detector(family: str, backbone: str) -> nn.Module:
    """In eval mode on the CPU; some dozen detections an image of ``CANVAS`` size pass its own threshold."""
    tree = FAMILIES[family](BACKBONES[backbone]())
    if "roi_heads" in tree:
        for name in ("box_pooler", "mask_pooler"):
            if name in tree.roi_heads:
                tree.roi_heads[name].canonical_box_size = 56  # on small canvases too, every level has boxes
    detector = build_student(tree, len(CLASS_NAMES), seed=0).eval()
    for name, parameter in detector.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter)
        elif ".conv2_offset." in name:  # or no tap would move
            nn.init.normal_(parameter, std=0.1)
    calibrate(detector, canvases(*CANVAS, 4, seed=1))
    return detector


def class_of(family: str) -> type[nn.Module]:
    return type(build_student(FAMILIES[family](BACKBONES["ResNet-18"]()), len(CLASS_NAMES), seed=0))
