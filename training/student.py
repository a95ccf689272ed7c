"""From a recipe's lazy model tree to a stock detector."""

from __future__ import annotations

import copy
from typing import Any

import torch
from detectron2.config import instantiate
from torch import nn


def build_student(model: Any, num_classes: int, *, pretrained: bool = False, seed: int | None = None) -> nn.Module:
    """Instantiate ``model`` for a data set's number of classes.

    Args:
        model: detectron2 lazy tree of a one-stage detector, or of one with ``roi_heads``.
        pretrained: load the backbone's ImageNet weights that the tree names; without, they are random, for callers that
            load a checkpoint next.
        seed: of the random weights; None leaves torch's generator as it is.
    """
    tree = copy.deepcopy(model)
    owner = tree if "num_classes" in tree else tree.roi_heads
    owner.num_classes = num_classes
    bottom_up = tree.backbone.get("bottom_up", tree.backbone)
    if not pretrained and "weights" in bottom_up:
        bottom_up.weights = None
    if seed is not None:
        torch.manual_seed(seed)
    return instantiate(tree)
