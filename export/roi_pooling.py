"""RoIAlign on a feature pyramid as two products of interpolation weights with the feature map.

A bin of RoIAlign is the mean of bilinear samples on a regular grid, and bilinear weights are a product of one along y
and one along x. So the pooled region is ``Wy @ F @ Wx.T`` with weights that depend on the box alone: exactly what
detectron2 computes, its number of samples that grows with the box included, in operators that every target has.

Why not the operator: TensorRT-RTX has RoiAlign as a plugin only, which asks for a CUDA driver to be created, so that no
engine could be built on a machine without a GPU. The products cost P * H * W * C multiplications a box and level:
measured on a CPU core, eagerly, five times the operator's time for 1,000 boxes, 256 channels and a 256 x 256 canvas.

Boxes go through in chunks, so that the products' intermediate result stays small; what pools also runs the head.

Shape legend: N images, M boxes an image, B boxes of a chunk, C channels, (H, W) a level's grid, P bins along an edge, D
values that a head gives for a box.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

CHUNK_ELEMENTS = 2**24
"""Largest number of values in the intermediate product of one image: 64 MiB."""


class PyramidPooling(nn.Module):
    """detectron2's ``ROIPooler`` with ``ROIAlignV2`` on maps of known sizes.

    Args:
        pooler: says levels, scales, bins and the rule that gives a box its level.
        grids: (H, W) of each level.
    """

    def __init__(self, pooler: ROIPooler, grids: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.num_bins = pooler.output_size[0]
        self.scales = tuple(float(level.spatial_scale) for level in pooler.level_poolers)
        self.grids = tuple(grids)
        canonical, level_of_canonical = pooler.canonical_box_size, pooler.canonical_level
        # A box is on level l or above where its edge is at least this; the first level has no lower bound.
        self.smallest_edges = tuple(
            canonical * 2.0 ** (level - level_of_canonical)
            for level in range(pooler.min_level + 1, pooler.max_level + 1)
        )

    def chunk_size(self, num_boxes: int, channels: int) -> int:
        """Number of boxes of a chunk, so that chunks are nearly equal and none is larger than the limit."""
        per_box = self.num_bins * channels * max(width for _, width in self.grids)
        return evenly(num_boxes, CHUNK_ELEMENTS // per_box)

    def forward(self, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Pool each box from its level.

        Args:
            maps: a level's features as (N, H, W * C).
            boxes: (N, B, 4) xyxy pixels within the canvas.

        Returns:
            (N * B, C, P, P).
        """
        num_boxes, bins = boxes.shape[1], self.num_bins
        level = self._levels(boxes)
        total = torch.zeros((), device=boxes.device)
        for index, (features, scale, (height, width)) in enumerate(zip(maps, self.scales, self.grids, strict=True)):
            corners = (boxes * scale - 0.5).unflatten(2, (2, 2))  # pixel centres are at whole numbers
            along_x, along_y = interpolation_weights(corners, (width, height), bins).unbind(2)
            along_y = along_y[..., :height] * (level == index)[:, :, None, None]
            rows = (along_y.flatten(1, 2) @ features).reshape(-1, num_boxes, bins, width, features.shape[2] // width)
            total = total + along_x[:, :, None, :, :width] @ rows
        return total.permute(0, 1, 4, 2, 3).flatten(0, 1)

    def _levels(self, boxes: Tensor) -> Tensor:
        """Position of each box's level, equation 1 of the FPN paper: (N, B, 4) → (N, B).

        Deviation: edges are compared with the levels' bounds instead of rounding a logarithm, which is exact on them.
        """
        edge = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).sqrt()
        level = torch.zeros_like(edge, dtype=torch.int32)
        for bound in self.smallest_edges:
            level = level + (edge >= bound).int()
        return level


def evenly(num_boxes: int, largest: int) -> int:
    """Size of the chunks, each of at most ``largest`` boxes, that divide ``num_boxes`` most evenly."""
    return math.ceil(num_boxes / math.ceil(num_boxes / max(1, largest)))


def interpolation_weights(corners: Tensor, num_cells: tuple[int, int], num_bins: int) -> Tensor:
    """What each column of cells contributes to each bin of a box along x, and each row along y.

    A bin is the mean of ``ceil(length / bins)`` equally spaced samples, a sample the linear interpolation of the two
    cells beside it, or the first or last cell beyond their centres. An edge of length 0 has no samples.

    Args:
        corners: (N, B, 2, 2), the boxes' corners (x1, y1), (x2, y2) in cells, from -0.5 to the number of cells - 0.5.
        num_cells: (W, H).

    Returns:
        (N, B, 2, P, max(W, H)), x first; each bin's weights add up to 1.
    """
    start, end = corners[:, :, 0, :, None, None], corners[:, :, 1, :, None, None]  # (N, B, 2, 1, 1)
    bin_length = (end - start) / num_bins
    num_samples = bin_length.ceil()
    sample = torch.arange(math.ceil(max(num_cells) / num_bins), device=start.device, dtype=torch.float32)
    offset = (sample + 0.5) * bin_length / num_samples.clamp(min=1)
    first = torch.arange(num_bins, device=start.device, dtype=torch.float32)[:, None] * bin_length
    width, height = num_cells
    axis = torch.arange(2, device=start.device, dtype=torch.float32)[:, None, None]
    last_cell = (width - 1) + axis * (height - width)  # no constant tensor, which the exporter refuses in a loop's body
    position = torch.minimum((start + first + offset).clamp(min=0), last_cell)  # (N, B, 2, P, samples)
    cell = torch.arange(max(num_cells), device=start.device, dtype=torch.float32)
    weight = (1 - (position[..., None] - cell).abs()).clamp(min=0)
    weight = weight * ((sample < num_samples) / num_samples.clamp(min=1))[..., None]
    return weight.sum(dim=4)


def maps_of(features: Sequence[Tensor]) -> list[Tensor]:
    """Feature maps (N, C, H, W) as (N, H, W * C), the layout that :class:`PyramidPooling` multiplies."""
    return [level.permute(0, 2, 3, 1).flatten(2) for level in features]


def in_chunks(
    head: Callable[[Tensor], Tensor], boxes: Tensor, *, chunk_size: int, num_values: int, num_used: Tensor
) -> Tensor:
    """Call ``head`` on the boxes of all images, a chunk at a time, and stop behind the last box that is used.

    Args:
        head: (N, B, 4) → (N, B, D).
        boxes: (N, M, 4), or more values a box.
        chunk_size: B.
        num_values: D.
        num_used: (N, 1) int32, how many of the first boxes count.

    Returns:
        (N, M, D); behind the last used box whatever, or zero.
    """
    num_boxes = boxes.shape[1]
    num_chunks = math.ceil(num_boxes / chunk_size)
    if num_chunks == 1:
        return head(boxes)
    boxes = torch.nn.functional.pad(boxes, (0, 0, 0, num_chunks * chunk_size - num_boxes))
    by_chunk = boxes.reshape(-1, num_chunks, chunk_size, boxes.shape[2])
    position = torch.arange(num_chunks, device=boxes.device)

    def unfinished(chunk: Tensor, values: Tensor) -> Tensor:
        return (chunk < num_chunks) & (chunk * chunk_size < num_used).any()

    def advance(chunk: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = head(by_chunk.index_select(1, chunk.reshape(1)).squeeze(1))
        here = (position == chunk)[:, None, None]
        return chunk + 1, torch.where(here, found[:, None], values)

    state = (
        torch.zeros((), dtype=torch.int64, device=boxes.device),
        by_chunk.new_zeros((by_chunk.shape[0], num_chunks, chunk_size, num_values)),
    )
    if torch.compiler.is_exporting():
        state = while_loop(unfinished, advance, state)
    else:  # run eagerly, the operator would compile its body; this is the loop it stands for
        while unfinished(*state):
            state = advance(*state)
    return state[1].flatten(1, 2)[:, :num_boxes]
