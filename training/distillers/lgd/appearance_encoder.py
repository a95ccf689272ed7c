"""Appearance encoder of LGD: the student's feature maps pooled inside each object, at each level.

Shapes: N images, M object slots per image, C channels, (Hl, Wl) size of a level's feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.distillers.lgd.normalization import normalize_samples


class AppearanceEncoder(nn.Module):
    """(N, C, Hl, Wl) features and (N, M, Hl * Wl) masks -> (N, M, C), zero for an object that covers no cell.

    One convolution, shared by all levels, is all it has.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        return mask_pool(F.relu(normalize_samples(self.projection(features)), inplace=True), masks)


def mask_pool(features: Tensor, masks: Tensor) -> Tensor:
    """Mean of the features over the cells of each mask; (N, C, Hl, Wl), (N, M, Hl * Wl) -> (N, M, C)."""
    with torch.autocast(features.device.type, enabled=False):
        total = masks @ features.flatten(2).transpose(1, 2)
        return total / masks.sum(dim=-1, keepdim=True).clamp(min=1)
