"""What losses consist of, one number at a time, for comparison with what the detectors compute of whole tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def softmax(logits: Tensor) -> list[Tensor]:
    powers = [torch.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def overlap(first: list[Any], second: list[Any]) -> tuple[Any, Any]:
    """IoU and GIoU of two xyxy boxes."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = width * height if width > 0 and height > 0 else 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = areas[0] + areas[1] - intersection
    hull = (max(first[2], second[2]) - min(first[0], second[0])) * (max(first[3], second[3]) - min(first[1], second[1]))
    return intersection / union, intersection / union - (hull - union) / hull


def gradients(loss: Any, predictions: Any) -> list[Tensor]:
    """Of every level of every prediction, zero where the loss does not come from it."""
    levels = [level for part in predictions for level in part]
    if not isinstance(loss, Tensor):
        return [torch.zeros_like(level) for level in levels]
    found = torch.autograd.grad(loss, levels, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(levels, found, strict=True)]
