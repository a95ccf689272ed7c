"""Lazy calls of the networks below a pyramid, and how each wants its pixels."""

from __future__ import annotations

from typing import Any, NamedTuple

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock

from training.backbones.deformable import DeformableBottleneckBlock
from training.backbones.swin import Swin
from training.backbones.timm_backbone import TimmBackbone


class Pixels(NamedTuple):
    """What a network's pretrained weights expect: channel order, and the mean and deviation of each channel."""

    input_format: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def arguments(self) -> dict[str, Any]:
        """As detectron2's detectors take them."""
        return {"pixel_mean": list(self.mean), "pixel_std": list(self.std), "input_format": self.input_format}


IMAGENET_RGB = Pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
CAFFE_BGR = Pixels("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
RESNEXT_BGR = Pixels("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395))

RESNET_STAGES = ("res3", "res4", "res5")
SWIN_STAGES = ("p1", "p2", "p3")  # strides 8, 16, 32; not the pyramid's p2, p3
_BOTTLENECK_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_DEPTHS = (18, 34, *_BOTTLENECK_BLOCKS)


def resnet(
    depth: int,
    *,
    norm: str = "FrozenBN",
    deformable: bool = False,
    out_features: tuple[str, ...] = RESNET_STAGES,
    freeze_at: int = 2,
    stride_in_1x1: bool = True,
) -> Any:
    """detectron2's ResNet as a lazy call.

    Args:
        depth: 18, 34, 50 or 101.
        norm: ``"FrozenBN"``, ``"BN"``, ``"SyncBN"`` or ``"GN"``.
        deformable: modulated deformable 3x3 convolutions in stages res3 to res5 (Zhu et al., CVPR 2019).
        freeze_at: number of frozen stages, the stem being the first; 0 with random weights.
        stride_in_1x1: where blocks of depth 50 and 101 have their stride: True for MSRA's weights, False for
            torchvision's.

    Raises:
        ValueError: there is no such depth, or no deformable form of it.
    """
    if depth not in _DEPTHS:
        raise ValueError(f"resnet depth is {depth}, expected one of {', '.join(map(str, _DEPTHS))}")
    if depth not in _BOTTLENECK_BLOCKS:
        if deformable:
            raise ValueError(f"resnet depth {depth} has no bottleneck to deform, expected 50 or 101 with deformable")
        stages: Any = L(ResNet.make_default_stages)(depth=depth, norm=norm)
    else:
        stages = _bottleneck_stages(depth, deformable=deformable, norm=norm, stride_in_1x1=stride_in_1x1)
    return _network(stages, norm=norm, out_features=out_features, freeze_at=freeze_at)


def resnext101_32x8d(
    *,
    norm: str = "FrozenBN",
    deformable: bool = False,
    out_features: tuple[str, ...] = RESNET_STAGES,
    freeze_at: int = 2,
) -> Any:
    """Xie et al., "Aggregated Residual Transformations", CVPR 2017: ResNet-101 with 32 groups of 8 channels, as a lazy
    call. Arguments as of :func:`resnet`; the stride sits in the 3x3 convolutions, for detectron2's and torchvision's
    weights alike.
    """
    stages = _bottleneck_stages(
        101, deformable=deformable, norm=norm, stride_in_1x1=False, num_groups=32, first_bottleneck_channels=256
    )
    return _network(stages, norm=norm, out_features=out_features, freeze_at=freeze_at)


def _network(stages: Any, *, norm: str, out_features: tuple[str, ...], freeze_at: int) -> Any:
    return L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm=norm),
        stages=stages,
        out_features=list(out_features),
        freeze_at=freeze_at,
    )


def _bottleneck_stages(
    depth: int,
    *,
    deformable: bool,
    norm: str,
    stride_in_1x1: bool,
    num_groups: int = 1,
    first_bottleneck_channels: int = 64,
) -> list[Any]:
    """Stages res2 to res5; all but the first are deformable where asked."""
    return [
        L(ResNet.make_stage)(
            block_class=DeformableBottleneckBlock if deformable and i > 0 else BottleneckBlock,
            num_blocks=num_blocks,
            stride_per_block=[1 if i == 0 else 2] + [1] * (num_blocks - 1),
            in_channels=64 if i == 0 else 128 * 2**i,
            out_channels=256 * 2**i,
            bottleneck_channels=first_bottleneck_channels * 2**i,
            num_groups=num_groups,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
        )
        for i, num_blocks in enumerate(_BOTTLENECK_BLOCKS[depth])
    ]


def swin_tiny(*, out_features: tuple[str, ...] = SWIN_STAGES, drop_path_rate: float = 0.2, freeze_at: int = -1) -> Any:
    """Liu et al., "Swin Transformer", ICCV 2021, the tiny one, under detectron2's names, as a lazy call.

    Args:
        out_features: of ``p0`` to ``p3``, with strides 4 to 32 and 96 to 768 channels.
        freeze_at: -1 trains everything, 0 freezes the patch embedding, i + 1 the first i stages too.
    """
    return L(Swin)(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=drop_path_rate,
        out_indices=[int(feature.removeprefix("p")) for feature in out_features],
        frozen_stages=freeze_at,
    )


def timm_backbone(
    name: str,
    *,
    weights: str | None,
    freeze_norm: bool = False,
    out_features: tuple[str, ...] = RESNET_STAGES,
    img_size: tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
) -> Any:
    """A timm feature extractor as a lazy call; arguments as of :class:`TimmBackbone`."""
    return L(TimmBackbone)(
        name=name,
        weights=weights,
        freeze_norm=freeze_norm,
        out_features=list(out_features),
        img_size=None if img_size is None else list(img_size),
        drop_path_rate=drop_path_rate,
    )
