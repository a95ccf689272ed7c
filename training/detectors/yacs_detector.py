"""A detector of one of detectron2's yaml (yacs) configurations, as a lazy tree calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from omegaconf import OmegaConf
from torch import nn


def yacs_detector(*, num_classes: int, config: Mapping[str, Any]) -> nn.Module:
    """Build what detectron2's ``build_model`` builds, with random weights, on the CPU.

    Args:
        num_classes, config: see :func:`yacs_config`.
    """
    return build_model(yacs_config(num_classes=num_classes, config=config))


def yacs_config(*, num_classes: int, config: Mapping[str, Any]) -> CfgNode:
    """detectron2's configuration object.

    Args:
        num_classes: of RetinaNet and of the ROI heads, whatever ``config`` says.
        config: the whole configuration as ``CfgNode.dump`` writes it.
    """
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode(OmegaConf.to_container(OmegaConf.create(config))))
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.DEVICE = "cpu"
    return cfg
