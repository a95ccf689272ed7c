"""Knowledge mapper of LGD: object vectors painted back onto the feature maps, and refined.

Shapes: N images, M object slots per image, C channels, (Hl, Wl) size of a level's feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.distillers.lgd.normalization import normalize_samples


class KnowledgeMapper(nn.Module):
    """(N, M, C) interacted embeddings and (N, M, Hl * Wl) masks -> (N, C, Hl, Wl) instructive features.

    Every sample of the result has mean 0 and variance 1 by construction. All levels share the weights.

    Args:
        channels: C.
        context_object: The last slot of each image is its context object, which is added to every cell instead of
            being painted. Without it there is no projection for it, so that no parameter goes without gradient.
    """

    def __init__(self, *, channels: int, context_object: bool) -> None:
        super().__init__()
        self.object_projection = nn.Linear(channels, channels)
        self.context_projection = nn.Linear(channels, channels) if context_object else None
        self.spread = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.refinement = nn.ModuleList(nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(3))

    def forward(self, interacted: Tensor, masks: Tensor, map_size: tuple[int, int]) -> Tensor:
        if self.context_projection is None:
            features = self.spread(self._paint(interacted, masks, map_size))
        else:
            features = self.spread(self._paint(interacted[:, :-1], masks[:, :-1], map_size))
            features = features + self.context_projection(interacted[:, -1])[..., None, None]
        for convolution in self.refinement:
            # A ReLU goes before each convolution: after the context was added, then after each normalisation.
            features = normalize_samples(convolution(F.relu(features)))
        return features

    def _paint(self, interacted: Tensor, masks: Tensor, map_size: tuple[int, int]) -> Tensor:
        """Sum over the objects of each one's vector at the cells that it covers."""
        with torch.autocast(interacted.device.type, enabled=False):
            painted = self.object_projection(interacted).transpose(1, 2) @ masks
        return painted.unflatten(-1, map_size)
