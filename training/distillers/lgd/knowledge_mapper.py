"""Knowledge mapper of LGD: object vectors painted back onto the feature maps, and refined.

Shapes: N images, M object slots per image, C channels, (Hl, Wl) size of a level's feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.distillers.lgd.normalization import normalize_planes, normalize_samples


class KnowledgeMapper(nn.Module):
    """(N, M, C) interacted embeddings and (N, M, Hl * Wl) masks -> (N, C, Hl, Wl) instructive features.

    Every sample of the result, with `residual` every plane, has mean 0 and variance 1 by construction. All levels
    share the weights.

    Args:
        channels: C.
        context_object: The last slot of each image is its context object, which is added to every cell instead of
            being painted. Without it there is no projection for it, so that no parameter goes without gradient.
        residual: Each refinement adds to its input, and planes are normalised instead of samples, whose variance is at
            first almost all between channels and hardly between cells.
    """

    def __init__(self, *, channels: int, context_object: bool, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.object_projection = nn.Linear(channels, channels)
        self.context_projection = nn.Linear(channels, channels) if context_object else None
        self.spread = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.refinement = nn.ModuleList(nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(3))

    def forward(self, interacted: Tensor, masks: Tensor, map_size: tuple[int, int]) -> Tensor:
        if self.context_projection is None:
            features = self._painted_and_spread(interacted, masks, map_size)
        else:
            features = self._painted_and_spread(interacted[:, :-1], masks[:, :-1], map_size)
            features = features + self.context_projection(interacted[:, -1])[..., None, None]
        if self.residual:
            for convolution in self.refinement:
                features = features + normalize_planes(convolution(F.relu(features)))
            return normalize_planes(features)
        for convolution in self.refinement:
            # A ReLU goes before each convolution: after the context was added, then after each normalisation.
            features = normalize_samples(convolution(F.relu(features, inplace=True)))
        return features

    def _painted_and_spread(self, interacted: Tensor, masks: Tensor, map_size: tuple[int, int]) -> Tensor:
        """The sum over the objects of each one's vector at the cells that it covers, through the first convolution."""
        with torch.autocast(interacted.device.type, enabled=False):
            vectors = self.object_projection(interacted)
        if 0 < 9 * vectors.shape[1] <= vectors.shape[2]:
            return self._spread_of_few(vectors, masks.unflatten(-1, map_size))
        with torch.autocast(interacted.device.type, enabled=False):
            painted = masks.transpose(1, 2) @ vectors
        return self.spread(self._as_maps(painted, map_size))

    def _spread_of_few(self, vectors: Tensor, masks: Tensor) -> Tensor:
        """(N, M, C), (N, M, Hl, Wl) -> (N, C, Hl, Wl): painting and convolution in one.

        For objects few next to channels. Both are linear, so the convolution can take the objects' vectors first, and
        their masks, each in its 9 shifts, then: 9 M C instead of 9 C C multiply-adds a cell.
        """
        kernels = torch.einsum("nmc,dcij->nmijd", vectors, self.spread.weight).flatten(1, 3)
        shifted = F.unfold(masks, kernel_size=3, padding=1)
        return self._as_maps(shifted.transpose(1, 2) @ kernels + self.spread.bias, masks.shape[-2:])

    def _as_maps(self, cells: Tensor, map_size: tuple[int, int]) -> Tensor:
        """(N, Hl * Wl, C) -> (N, C, Hl, Wl) in the convolutions' memory layout; for channels-last nothing is copied."""
        is_channels_last = self.spread.weight.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if is_channels_last else torch.contiguous_format
        return cells.transpose(1, 2).unflatten(-1, map_size).contiguous(memory_format=layout)
