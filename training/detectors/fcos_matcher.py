"""FCOS: a location near an object's centre learns that object, on the level of the object's size.

Reference: Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019, with centre sampling, as
the LGD paper's published numbers have it.

Shape legend: R locations of all levels together, M boxes of one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.detectors.locations import LocationGrid, edge_distances


class FcosMatcher:
    """A location takes the smallest box that it lies near the centre of and that is of its level's size.

    Args:
        center_sampling_radius: half the side of the square around a box's centre, clipped to the box, whose locations
            are positive; in strides of the level.
        level_size_bounds: which level a location's object belongs to, by the largest distance to its edges in pixels:
            level i takes from bound i - 1 to bound i, both included; one bound less than levels.
    """

    def __init__(
        self, *, center_sampling_radius: float = 1.5, level_size_bounds: Sequence[float] = (64, 128, 256, 512)
    ) -> None:
        self.center_sampling_radius = center_sampling_radius
        self.level_size_bounds = tuple(level_size_bounds)

    def __call__(self, grid: LocationGrid, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """See :data:`training.detectors.locations.Match`.

        Raises:
            ValueError: the bounds are not one less than the grid's levels.
        """
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        radius = self.center_sampling_radius * grid.strides[:, None]  # (R, 1)
        region = torch.cat(
            [
                torch.maximum(centres[:, None] - radius, boxes[:, None, :2]),
                torch.minimum(centres[:, None] + radius, boxes[:, None, 2:]),
            ],
            dim=-1,
        )  # (M, R, 4)
        near_centre = edge_distances(grid.points, region).amin(dim=-1) > 0
        size = edge_distances(grid.points, boxes[:, None]).amax(dim=-1)
        smallest, largest = self._level_sizes(grid)
        possible = near_centre & (size >= smallest) & (size <= largest)
        extent = boxes[:, 2:] - boxes[:, :2]
        area = torch.where(possible, (extent[:, 0] * extent[:, 1])[:, None], torch.inf)
        smallest_area, matched = area.min(dim=0)
        return matched, smallest_area < torch.inf

    def _level_sizes(self, grid: LocationGrid) -> tuple[Tensor, Tensor]:
        """Smallest and largest size (R,) that each location is responsible for."""
        num_levels = len(grid.num_per_level)
        if len(self.level_size_bounds) != num_levels - 1:
            raise ValueError(
                f"level_size_bounds has {len(self.level_size_bounds)} values for {num_levels} levels; give one less "
                "than levels"
            )
        bounds = (-1.0, *self.level_size_bounds, float("inf"))
        levels = list(enumerate(grid.num_per_level))
        smallest = torch.cat([grid.strides.new_full((count,), bounds[i]) for i, count in levels])
        largest = torch.cat([grid.strides.new_full((count,), bounds[i + 1]) for i, count in levels])
        return smallest, largest
