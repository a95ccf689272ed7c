"""Lazy model trees of one-stage detectors that recipes start from and change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead

from pipeline.recipe_parts.backbones import IMAGENET_RGB, RESNET_STAGES, Pixels
from training.detectors.atss_matcher import AtssMatcher
from training.detectors.distribution_retinanet import DistributionRetinaNet, DistributionRetinaNetHead
from training.detectors.fcos_matcher import FcosMatcher
from training.detectors.gfl_detector import GflDetector
from training.detectors.location_detector import LocationDetector
from training.detectors.location_head import GflHead, LocationHead
from training.detectors.stock_fcos import stock_fcos

LEVELS = ["p3", "p4", "p5", "p6", "p7"]
FOCAL_LOSS = {"focal_loss_alpha": 0.25, "focal_loss_gamma": 2.0}


def retinanet(
    bottom_up: Any,
    *,
    channels: int = 256,
    num_head_convs: int = 4,
    smallest_anchor_pixels: int = 32,
    head_norm: str = "",
    bottom_up_features: Sequence[str] = RESNET_STAGES,
    top_block_in: str = "p5",
    res5_channels: int = 2048,
    reg_max: int | None = None,
    pixels: Pixels = IMAGENET_RGB,
) -> Any:
    """Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, as detectron2 builds it: pyramid levels p3 to p7,
    nine anchors a location, three octave scales from ``smallest_anchor_pixels`` on p3 doubling with each level.

    Args:
        bottom_up: lazy call of a network with the outputs ``bottom_up_features``.
        channels: of the pyramid and the head.
        num_head_convs: 3x3 convolutions in each of the head's two towers.
        smallest_anchor_pixels: side of the smallest anchor of p3.
        head_norm: behind the towers' convolutions, ``"GN"`` or ``""`` for none.
        bottom_up_features: of strides 8, 16 and 32.
        top_block_in: what p6 and p7 are made from: ``"p5"``, or ``"res5"`` as with ResNets in the papers.
        res5_channels: of ``res5``, where p6 is made from it.
        reg_max: edges are predicted as distributions of distances from 0 to this many strides, trained with GIoU, as
            localisation distillation needs them (16 in its paper); None: boxes are detectron2's deltas.
        pixels: channel order, mean and deviation that the network below wants.
    """
    head = {**_stock_head(channels, num_head_convs, head_norm), "num_anchors": 9}
    shared = {
        "backbone": _pyramid(bottom_up, channels, bottom_up_features, top_block_in, res5_channels),
        "anchor_generator": _nine_anchors(smallest_anchor_pixels),
        "anchor_matcher": L(Matcher)(thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True),
        "test_score_thresh": 0.05,
        **FOCAL_LOSS,
        **_shared(pixels),
    }
    if reg_max is not None:
        distributions = L(DistributionRetinaNetHead)(**head, reg_max=reg_max)
        return L(DistributionRetinaNet)(head=distributions, box_loss_weight=2.0, test_nms_thresh=0.6, **shared)
    return L(RetinaNet)(
        head=L(RetinaNetHead)(**head),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        test_nms_thresh=0.5,
        vis_period=0,
        **shared,
    )


def fcos(
    bottom_up: Any,
    *,
    channels: int = 256,
    num_head_convs: int = 4,
    head_norm: str = "GN",
    bottom_up_features: Sequence[str] = RESNET_STAGES,
    pixels: Pixels = IMAGENET_RGB,
) -> Any:
    """FCOS (Tian et al., ICCV 2019) as detectron2 builds it: no scale a level, a running loss normaliser, a score
    threshold of 0.2 after centerness. :func:`paper_fcos` is the form of the LGD paper's numbers.

    Args:
        bottom_up: lazy call of a network with the outputs ``bottom_up_features``.
        channels: of the pyramid and the head; with ``head_norm="GN"`` a multiple of 32, 64 at least.
        num_head_convs: 3x3 convolutions in each of the head's two towers.
        head_norm: behind the towers' convolutions, ``"GN"`` or ``""`` for none.
        bottom_up_features: of strides 8, 16 and 32.
        pixels: channel order, mean and deviation that the network below wants.
    """
    return L(stock_fcos)(
        backbone=_pyramid(bottom_up, channels, bottom_up_features),
        head=L(FCOSHead)(**_stock_head(channels, num_head_convs, head_norm)),
        center_sampling_radius=1.5,
        test_score_thresh=0.2,
        test_nms_thresh=0.6,
        **FOCAL_LOSS,
        **_shared(pixels),
    )


def paper_fcos(
    bottom_up: Any,
    *,
    channels: int = 256,
    num_head_convs: int = 4,
    norm_groups: int = 32,
    level_size_bounds: Sequence[float] = (64, 128, 256, 512),
    bottom_up_features: Sequence[str] = RESNET_STAGES,
    top_block_in: str = "p5",
    res5_channels: int = 2048,
    reg_max: int | None = None,
    pixels: Pixels = IMAGENET_RGB,
) -> Any:
    """FCOS in the form of the LGD paper's numbers.

    Args:
        bottom_up: lazy call of a network with the outputs ``bottom_up_features``.
        channels: of the pyramid and the head.
        num_head_convs: 3x3 convolutions in each of the head's two towers.
        norm_groups: of the group normalisation behind each; divides the channels into groups of two or more.
        level_size_bounds: largest object of p3, p4, p5 and p6 in pixels, by the distance from a location to the
            farthest edge; lower them for small images.
        bottom_up_features: of strides 8, 16 and 32.
        top_block_in: what p6 and p7 are made from: ``"p5"``, or ``"res5"`` as in the LGD paper's, whose pyramid is that
            of its RetinaNet.
        res5_channels: of ``res5``, where p6 is made from it.
        reg_max: edges are predicted as distributions of distances from 0 to this many strides, as localisation
            distillation needs them (16 in its paper); None: as distances.
        pixels: channel order, mean and deviation that the network below wants.
    """
    return L(LocationDetector)(
        backbone=_pyramid(bottom_up, channels, bottom_up_features, top_block_in, res5_channels),
        head=L(LocationHead)(**_location_head(channels, num_head_convs, norm_groups), reg_max=reg_max),
        matcher=L(FcosMatcher)(center_sampling_radius=1.5, level_size_bounds=list(level_size_bounds)),
        box_loss_weight=1.0,
        test_score_thresh=0.05,
        test_nms_thresh=0.6,
        **FOCAL_LOSS,
        **_shared(pixels),
    )


def atss(
    bottom_up: Any,
    *,
    channels: int = 256,
    num_head_convs: int = 4,
    norm_groups: int = 32,
    bottom_up_features: Sequence[str] = RESNET_STAGES,
    top_block_in: str = "p5",
    res5_channels: int = 2048,
    reg_max: int | None = None,
    pixels: Pixels = IMAGENET_RGB,
) -> Any:
    """ATSS (Zhang et al., CVPR 2020) with the head and losses of :func:`paper_fcos`; arguments as there."""
    return L(LocationDetector)(
        backbone=_pyramid(bottom_up, channels, bottom_up_features, top_block_in, res5_channels),
        head=L(LocationHead)(**_location_head(channels, num_head_convs, norm_groups), reg_max=reg_max),
        matcher=L(AtssMatcher)(anchor_scale=8.0, num_level_candidates=9),
        box_loss_weight=2.0,
        test_score_thresh=0.05,
        test_nms_thresh=0.6,
        **FOCAL_LOSS,
        **_shared(pixels),
    )


def gfl(
    bottom_up: Any,
    *,
    channels: int = 256,
    num_head_convs: int = 4,
    norm_groups: int = 32,
    bottom_up_features: Sequence[str] = RESNET_STAGES,
    top_block_in: str = "p5",
    res5_channels: int = 2048,
    reg_max: int = 16,
    pixels: Pixels = IMAGENET_RGB,
) -> Any:
    """GFL (Li et al., "Generalized Focal Loss", NeurIPS 2020): the assignment of :func:`atss`, one score of class and
    quality, and a distribution an edge; arguments as of :func:`paper_fcos`.

    Args:
        reg_max: the distributions are over distances from 0 to this many strides.
    """
    return L(GflDetector)(
        backbone=_pyramid(bottom_up, channels, bottom_up_features, top_block_in, res5_channels),
        head=L(GflHead)(**_location_head(channels, num_head_convs, norm_groups), reg_max=reg_max),
        matcher=L(AtssMatcher)(anchor_scale=8.0, num_level_candidates=9),
        quality_focal_beta=2.0,
        box_loss_weight=2.0,
        distribution_loss_weight=0.25,
        test_score_thresh=0.05,
        test_nms_thresh=0.6,
        **_shared(pixels),
    )


def _shared(pixels: Pixels) -> dict[str, Any]:
    """What every one-stage detector starts from: levels, COCO's classes, lengths of lists, pixels."""
    return {
        "head_in_features": LEVELS,
        "num_classes": 80,
        "test_topk_candidates": 1000,
        "max_detections_per_image": 100,
        **pixels.arguments(),
    }


def _pyramid(
    bottom_up: Any,
    channels: int,
    bottom_up_features: Sequence[str],
    top_block_in: str = "p5",
    res5_channels: int = 2048,
) -> Any:
    """Levels p3 to p7 with p6 and p7 from p5 or from the network's last output."""
    if top_block_in not in ("p5", "res5"):
        raise ValueError(f"top_block_in is {top_block_in!r}, expected 'p5' or 'res5'")
    return L(FPN)(
        bottom_up=bottom_up,
        in_features=list(bottom_up_features),
        out_channels=channels,
        top_block=L(LastLevelP6P7)(
            in_channels=channels if top_block_in == "p5" else res5_channels,
            out_channels=channels,
            in_feature=top_block_in,
        ),
    )


def _nine_anchors(smallest_pixels: int) -> Any:
    """Three octave scales from ``smallest_pixels`` on p3, doubling with each level, in three shapes."""
    sizes = [[smallest_pixels * 2 ** (level + octave / 3) for octave in range(3)] for level in range(len(LEVELS))]
    return L(DefaultAnchorGenerator)(
        sizes=sizes, aspect_ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128], offset=0.0
    )


def _stock_head(channels: int, num_head_convs: int, head_norm: str) -> dict[str, Any]:
    return {
        "input_shape": [ShapeSpec(channels=channels)] * len(LEVELS),
        "num_classes": "${..num_classes}",
        "conv_dims": [channels] * num_head_convs,
        "prior_prob": 0.01,
        "norm": head_norm,
    }


def _location_head(channels: int, num_head_convs: int, norm_groups: int) -> dict[str, Any]:
    return {
        "channels": channels,
        "num_classes": "${..num_classes}",
        "num_levels": len(LEVELS),
        "num_convs": num_head_convs,
        "norm_groups": norm_groups,
        "prior_prob": 0.01,
    }
