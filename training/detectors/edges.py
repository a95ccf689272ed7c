"""How the values that a head predicts say where a box's edges are: as distances, or as distributions of distances.

Distances are those of the left, top, right and bottom edge from a point, in strides of the level, never negative.
"""

from __future__ import annotations

import torch
from torch import Tensor


class EdgeRegression:
    """One value an edge: its distance where it is positive, 0 where not."""

    values_per_edge = 1

    def distances(self, values: Tensor) -> Tensor:
        """(..., 4) → (..., 4) float32."""
        return values.float().relu()


class EdgeDistributions:
    """``reg_max + 1`` values an edge: logits of a distribution over the distances 0, 1, ..., ``reg_max``, whose
    expectation is the edge's distance.

    Li et al., "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense Object Detection",
    NeurIPS 2020, arXiv:2006.04388.

    Args:
        reg_max: the largest distance that can be predicted, in strides; 16 in the papers.

    Raises:
        ValueError: not a whole number of 1 or more.
    """

    def __init__(self, *, reg_max: int) -> None:
        if type(reg_max) is not int or reg_max < 1:
            raise ValueError(
                f"the head's reg_max is {reg_max!r}, expected a whole number of 1 or more: the largest distance of an "
                "edge in strides of its level; objects with farther edges cannot be learnt, the papers have 16"
            )
        self.reg_max = reg_max
        self.values_per_edge = reg_max + 1

    def logits(self, values: Tensor) -> Tensor:
        """(..., 4 * (reg_max + 1)) → (..., 4, reg_max + 1) float32."""
        return values.float().unflatten(-1, (4, self.values_per_edge))

    def distances(self, values: Tensor) -> Tensor:
        """(..., 4 * (reg_max + 1)) → (..., 4) float32."""
        steps = torch.arange(self.values_per_edge, dtype=torch.float32, device=values.device)
        return (self.logits(values).softmax(dim=-1) * steps).sum(dim=-1)


Edges = EdgeRegression | EdgeDistributions


def edges_of(reg_max: int | None) -> Edges:
    """Distributions up to ``reg_max``; regression where it is None."""
    return EdgeRegression() if reg_max is None else EdgeDistributions(reg_max=reg_max)
