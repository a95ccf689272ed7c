"""Relation adapter of LGD: objects of one image exchange what they know, by cross-attention of appearance and labels.

Shapes: L levels, N images, M object slots per image, C channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from training.distillers.lgd.label_encoder import NormalizedLinear

Query = Literal["appearance", "label"]


class RelationAdapter(nn.Module):
    """(L, N, M, C) appearance and (N, M, C) label embeddings -> (L, N, M, C) interacted embeddings.

    One multi-head attention serves all levels; in the paper its output is used as it is, without residual or
    normalisation. Images are attention's batch and padding is masked, which equals one sequence of all objects with
    other images blocked.

    Args:
        channels: C.
        num_heads: Heads of the attention; divides C.
        query: "appearance" asks with the appearance and reads labels (the paper's); "label" the other way round.
        residual: Add each object's own label embedding to what attention gives it.
    """

    def __init__(self, *, channels: int, num_heads: int, query: Query, residual: bool) -> None:
        super().__init__()
        self.query = query
        self.residual = residual
        self.label_projection = NormalizedLinear(channels, channels)
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)

    def forward(self, appearance: Tensor, labels: Tensor, is_object: Tensor) -> Tensor:
        num_levels = len(appearance)
        with torch.autocast(appearance.device.type, enabled=False):
            label = self.label_projection(labels)
            asking, answering = appearance, label.expand_as(appearance)
            if self.query == "label":
                asking, answering = answering, asking
            key = answering.flatten(0, 1)
            is_padding = ~is_object.repeat(num_levels, 1)
            interacted, _ = self.attention(
                asking.flatten(0, 1), key, key, key_padding_mask=is_padding, need_weights=False
            )
            interacted = interacted.unflatten(0, (num_levels, -1))
        return interacted + label if self.residual else interacted
