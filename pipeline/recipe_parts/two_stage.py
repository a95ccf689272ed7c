"""Lazy model trees of two-stage detectors that recipes start from and change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)

from pipeline.recipe_parts.backbones import CAFFE_BGR, Pixels

RPN_LEVELS = ["p2", "p3", "p4", "p5", "p6"]
ROI_LEVELS = ["p2", "p3", "p4", "p5"]
ROI_SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
BOX_BINS, MASK_BINS = 7, 14


def faster_rcnn(
    bottom_up: Any,
    *,
    channels: int = 256,
    bottom_up_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
    smallest_anchor_pixels: int = 32,
    num_proposals: int = 1000,
    box_head_channels: Sequence[int] = (1024, 1024),
    pixels: Pixels = CAFFE_BGR,
) -> Any:
    """Ren et al., "Faster R-CNN", NeurIPS 2015, on the pyramid of Lin et al., CVPR 2017, as detectron2 builds it
    (``Base-RCNN-FPN``): levels p2 to p6, three anchors a location, boxes pooled from p2 to p5.

    Args:
        bottom_up: lazy call of a network with the outputs ``bottom_up_features``, of strides 4, 8, 16 and 32.
        channels: of the pyramid.
        smallest_anchor_pixels: edge of the square anchor on p2; it doubles with each level.
        num_proposals: kept of each image by the first stage, in training and in inference.
        box_head_channels: outputs of the fully connected layers of the second stage.
        pixels: channel order, mean and deviation that the network below wants.
    """
    return L(GeneralizedRCNN)(
        backbone=L(FPN)(
            bottom_up=bottom_up,
            in_features=list(bottom_up_features),
            out_channels=channels,
            top_block=L(LastLevelMaxPool)(),
        ),
        proposal_generator=_proposal_generator(channels, smallest_anchor_pixels, num_proposals),
        roi_heads=L(StandardROIHeads)(
            num_classes=80,
            batch_size_per_image=512,
            positive_fraction=0.25,
            proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
            box_in_features=ROI_LEVELS,
            box_pooler=_pooler(BOX_BINS),
            box_head=L(FastRCNNConvFCHead)(
                input_shape=ShapeSpec(channels=channels, height=BOX_BINS, width=BOX_BINS),
                conv_dims=[],
                fc_dims=list(box_head_channels),
            ),
            box_predictor=L(FastRCNNOutputLayers)(
                input_shape=ShapeSpec(channels=box_head_channels[-1]),
                test_score_thresh=0.05,
                test_nms_thresh=0.5,
                test_topk_per_image=100,
                box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
                num_classes="${..num_classes}",
            ),
        ),
        **pixels.arguments(),
    )


def mask_rcnn(
    bottom_up: Any,
    *,
    channels: int = 256,
    bottom_up_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
    smallest_anchor_pixels: int = 32,
    num_proposals: int = 1000,
    box_head_channels: Sequence[int] = (1024, 1024),
    mask_head_channels: Sequence[int] = (256, 256, 256, 256, 256),
    pixels: Pixels = CAFFE_BGR,
) -> Any:
    """He et al., "Mask R-CNN", ICCV 2017: :func:`faster_rcnn` with a third head that draws a 28 x 28 mask in each box.

    Args:
        mask_head_channels: outputs of the mask head's 3x3 convolutions and, last, of its transposed convolution.
    """
    model = faster_rcnn(
        bottom_up,
        channels=channels,
        bottom_up_features=bottom_up_features,
        smallest_anchor_pixels=smallest_anchor_pixels,
        num_proposals=num_proposals,
        box_head_channels=box_head_channels,
        pixels=pixels,
    )
    model.roi_heads.mask_in_features = ROI_LEVELS
    model.roi_heads.mask_pooler = _pooler(MASK_BINS)
    model.roi_heads.mask_head = L(MaskRCNNConvUpsampleHead)(
        input_shape=ShapeSpec(channels=channels, height=MASK_BINS, width=MASK_BINS),
        num_classes="${..num_classes}",
        conv_dims=list(mask_head_channels),
    )
    return model


def _proposal_generator(channels: int, smallest_anchor_pixels: int, num_proposals: int) -> Any:
    return L(RPN)(
        in_features=RPN_LEVELS,
        head=L(StandardRPNHead)(in_channels=channels, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[smallest_anchor_pixels * 2**level] for level in range(len(RPN_LEVELS))],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(2 * num_proposals, num_proposals),
        post_nms_topk=(num_proposals, num_proposals),
        nms_thresh=0.7,
    )


def _pooler(num_bins: int) -> Any:
    return L(ROIPooler)(output_size=num_bins, scales=ROI_SCALES, sampling_ratio=0, pooler_type="ROIAlignV2")
