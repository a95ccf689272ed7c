"""The locations that a pyramid predicts at, and what each of them is to learn.

Nothing here waits for the device: what is chosen is masked, never indexed by a condition.

Shape legend: N images, R locations of all levels together, M boxes of one image, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor


class LocationGrid(NamedTuple):
    """All levels' locations, level by level and row by row.

    Attributes:
        points: (R, 2) float32, x and y of the cells' centres in pixels.
        strides: (R,) float32, the level's stride in pixels.
        num_per_level: locations of each level; their sum is R.
    """

    points: Tensor
    strides: Tensor
    num_per_level: tuple[int, ...]


class LocationTargets(NamedTuple):
    """What each location is to learn.

    Attributes:
        labels: (N, R) int64; K where there is no object.
        distances: (N, R, 4) float32 to left, top, right and bottom edge, in strides; 0 where there is no object.
        centerness: (N, R) float32 in [0, 1]; 0 where there is no object.
        num_positives, sum_centerness: float32 scalars of this batch, each the mean over all processes.
    """

    labels: Tensor
    distances: Tensor
    centerness: Tensor
    num_positives: Tensor
    sum_centerness: Tensor


# From the grid and an image's boxes (M, 4), M > 0, to the box (R,) that each location belongs to and whether (R,) it
# belongs to any. Raises ValueError where it is made for other levels than the grid's.
Match = Callable[[LocationGrid, Tensor], tuple[Tensor, Tensor]]


def location_grid(features: Sequence[Tensor], strides: Sequence[int]) -> LocationGrid:
    """The locations of levels with these features (N, C, h, w), each of its own stride."""
    points, sizes = [], []
    for feature, stride in zip(features, strides, strict=True):
        height, width = feature.shape[-2:]
        y, x = ((torch.arange(n, dtype=torch.float32, device=feature.device) + 0.5) * stride for n in (height, width))
        points.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).view(-1, 2))
        sizes.append(points[-1].new_full((height * width,), float(stride)))
    return LocationGrid(torch.cat(points), torch.cat(sizes), tuple(len(level) for level in points))


def edge_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances of points (..., 2) from the left, top, right and bottom edges of boxes (..., 4): (..., 4) pixels."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


@torch.no_grad()
def location_targets(
    grid: LocationGrid, gt_instances: Sequence[Instances], num_classes: int, match: Match
) -> LocationTargets:
    """Let ``match`` assign boxes to locations, and derive what is to be learned there.

    Args:
        gt_instances: of each image, on the grid's device, with ``gt_boxes`` and ``gt_classes``; may be empty.
        num_classes: K.
        match: see :data:`Match`.
    """
    labels, distances = [], []
    for instances in gt_instances:
        if len(instances) == 0:
            labels.append(torch.full_like(grid.strides, num_classes, dtype=torch.int64))
            distances.append(torch.zeros_like(grid.strides)[:, None].expand(-1, 4))
            continue
        boxes = instances.gt_boxes.tensor.float()
        matched, positive = match(grid, boxes)
        labels.append(torch.where(positive, instances.gt_classes[matched], num_classes))
        found = edge_distances(grid.points, boxes[matched]) / grid.strides[:, None]
        distances.append(torch.where(positive[:, None], found, 0.0))
    stacked, edges = torch.stack(labels), torch.stack(distances)
    centerness = _centerness(edges)
    counts = world_mean(torch.stack([(stacked != num_classes).float().sum(), centerness.sum()]))
    return LocationTargets(stacked, edges, centerness, counts[0], counts[1])


def world_mean(values: Tensor) -> Tensor:
    """The mean of ``values`` over all processes of the default group."""
    if comm.get_world_size() == 1:
        return values
    values = values.clone()
    torch.distributed.all_reduce(values)
    return values / comm.get_world_size()


def _centerness(distances: Tensor) -> Tensor:
    """FCOS, equation 3: how central a location is between the edges; (..., 4) → (...), 0 for zero distances."""
    shares = []
    for pair in (distances[..., 0::2], distances[..., 1::2]):
        shares.append(pair.amin(dim=-1) / pair.amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny))
    return (shares[0] * shares[1]).sqrt()
