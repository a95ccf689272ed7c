"""Pooling by products against detectron2's RoIAlign."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from export.roi_pooling import PyramidPooling, in_chunks, maps_of


@pytest.mark.parametrize("num_bins", [7, 14])
def test_pooling_by_products_equals_roi_align_on_every_level(num_bins: int) -> None:
    generator = torch.Generator().manual_seed(0)
    height, width, channels = 224, 352, 6
    pooler = ROIPooler(num_bins, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, "ROIAlignV2")
    grids = [(height // stride, width // stride) for stride in (4, 8, 16, 32)]
    features = [torch.randn(2, channels, *grid, generator=generator) for grid in grids]
    corners = torch.rand(2, 300, 2, 2, generator=generator) * torch.tensor([width, height])
    corners[:, :150] = corners[:, :150].mean(dim=2, keepdim=True) + torch.tensor([[-20.0, -20.0], [20.0, 20.0]])
    boxes = torch.cat([corners.amin(dim=2), corners.amax(dim=2)], dim=2)
    boxes[:, 0] = torch.tensor([0.0, 0.0, width, height])
    boxes[:, 1] = torch.tensor([0.0, 100.0, width, 103.0])
    boxes[:, 2] = 0.0
    boxes[:, 3] = torch.tensor([10.0, 10.0, 122.0, 122.0])  # exactly on the bound between two levels
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height]))
    expected = pooler(features, [Boxes(image) for image in boxes])
    pooling, maps = PyramidPooling(pooler, grids), maps_of(features)
    torch.testing.assert_close(pooling(maps, boxes), expected, atol=1e-5, rtol=1e-5)
    found = in_chunks(
        lambda chunk: pooling(maps, chunk).reshape(2, chunk.shape[1], -1),
        boxes,
        chunk_size=77,
        num_values=channels * num_bins**2,
        num_used=torch.tensor([[300], [1]]),
    )
    torch.testing.assert_close(found.flatten(0, 1), expected.flatten(1), atol=1e-5, rtol=1e-5)


def test_chunks_behind_the_last_used_box_are_not_computed() -> None:
    calls: list[int] = []

    def head(chunk: torch.Tensor) -> torch.Tensor:
        calls.append(chunk.shape[1])
        return chunk[..., :1] + 1

    values = in_chunks(head, torch.ones(2, 10, 4), chunk_size=4, num_values=1, num_used=torch.tensor([[0], [5]]))
    assert calls == [4, 4]
    assert values.flatten(1).tolist() == [[2.0] * 8 + [0.0] * 2] * 2
