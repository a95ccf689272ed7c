"""Lazy model trees that recipes start from and change."""

from pipeline.recipe_parts.backbones import (
    CAFFE_BGR,
    IMAGENET_RGB,
    RESNEXT_BGR,
    Pixels,
    resnet,
    resnext101_32x8d,
    swin_tiny,
    timm_backbone,
)
from pipeline.recipe_parts.dense import atss, fcos, paper_fcos, retinanet
from pipeline.recipe_parts.two_stage import faster_rcnn, mask_rcnn

__all__ = [
    "CAFFE_BGR",
    "IMAGENET_RGB",
    "RESNEXT_BGR",
    "Pixels",
    "atss",
    "faster_rcnn",
    "fcos",
    "mask_rcnn",
    "paper_fcos",
    "resnet",
    "resnext101_32x8d",
    "retinanet",
    "swin_tiny",
    "timm_backbone",
]
