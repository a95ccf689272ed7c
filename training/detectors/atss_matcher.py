"""ATSS: which locations learn an object follows from the statistics of that object's own candidates.

Reference: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample
Selection", CVPR 2020, arXiv:1912.02424.

Shape legend: R locations of all levels together, M boxes of one image.
"""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from training.detectors.locations import LocationGrid, edge_distances


class AtssMatcher:
    """A candidate whose IoU reaches mean + deviation of its object's candidates, and that lies in the object, takes
    that object; of several, the one with the highest IoU.

    IoUs are those of one square anchor a location, which serves nothing else. Deviation: a pyramid with a single
    location in all, where the deviation is undefined, counts it as zero.

    Args:
        anchor_scale: side of the anchors in strides of their level.
        num_level_candidates: locations of each level, nearest to an object's centre, that are candidates; a smaller
            level gives all it has.
    """

    def __init__(self, *, anchor_scale: float = 8.0, num_level_candidates: int = 9) -> None:
        self.anchor_scale = anchor_scale
        self.num_level_candidates = num_level_candidates

    def __call__(self, grid: LocationGrid, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """See :data:`training.detectors.locations.Match`."""
        half = self.anchor_scale / 2 * grid.strides[:, None]
        iou = pairwise_iou(Boxes(boxes), Boxes(torch.cat([grid.points - half, grid.points + half], dim=1)))  # (M, R)
        candidates = self._candidates(grid, boxes)
        candidate_iou = iou.gather(1, candidates)
        threshold = candidate_iou.mean(dim=1, keepdim=True)
        if candidates.shape[1] > 1:
            threshold = threshold + candidate_iou.std(dim=1, keepdim=True)  # unbiased
        is_candidate = torch.zeros_like(iou, dtype=torch.bool).scatter_(1, candidates, True)
        inside = edge_distances(grid.points, boxes[:, None]).amin(dim=-1) > 0
        possible = is_candidate & inside & (iou >= threshold)
        highest, matched = torch.where(possible, iou, -1.0).max(dim=0)
        return matched, highest >= 0

    def _candidates(self, grid: LocationGrid, boxes: Tensor) -> Tensor:
        """Positions on the grid of the locations nearest to each box's centre, level by level: (M, candidates)."""
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        squares = (centres[:, None] - grid.points).square().sum(dim=-1)  # (M, R)
        nearest, first = [], 0
        for level in squares.split(grid.num_per_level, dim=1):
            count = min(self.num_level_candidates, level.shape[1])
            nearest.append(level.topk(count, dim=1, largest=False).indices + first)
            first += level.shape[1]
        return torch.cat(nearest, dim=1)
