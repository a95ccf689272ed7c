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
        model: lazy tree with ``num_classes``, or of a detector whose ``roi_heads`` has it.
        pretrained: load the backbone's ImageNet weights that the tree names; without, they are random, for callers that
            load a checkpoint next.
        seed: of the random weights; None leaves torch's generator as it is.
    """
    tree = copy.deepcopy(model)
    class_owner(tree).num_classes = num_classes
    backbone = tree.get("backbone", {})
    bottom_up = backbone.get("bottom_up", backbone)
    if not pretrained and "weights" in bottom_up:
        bottom_up.weights = None
    if seed is not None:
        torch.manual_seed(seed)
    return instantiate(tree)


def class_owner(model: Any) -> Any:
    """The node of a model's lazy tree that says the number of classes."""
    return model if "num_classes" in model else model.roi_heads
