"""Normalisations without learned parameters, in float32 at least, whatever autocast is doing around them.

Half precision loses too much in a variance: these are the fragile operations of the implicit teacher and of the
distillation loss. Epsilon is 1e-5 throughout (the PyTorch default).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, widened to float32 where it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalize_vectors(x: Tensor) -> Tensor:
    """Layer normalisation over the channels of each object; (..., C) -> (..., C)."""
    return F.layer_norm(at_least_float32(x), x.shape[-1:])


def normalize_samples(x: Tensor) -> Tensor:
    """Group normalisation with one group: mean 0, variance 1 over (C, H, W) of each image; (N, C, H, W)."""
    # The CPU kernel for channels-last sums less exactly: a gradient was 1.3e-4 off. The GPU's makes this copy itself.
    return F.group_norm(at_least_float32(x).contiguous(), num_groups=1)


def normalize_planes(x: Tensor) -> Tensor:
    """Instance normalisation: mean 0, variance 1 over (H, W) of each channel of each image; (N, C, H, W).

    Equal to `F.instance_norm`, which refuses planes of a single cell (they become 0 here).
    """
    return F.layer_norm(at_least_float32(x), x.shape[-2:])
