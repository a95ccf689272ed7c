"""Locations, objects and what the ones learn of the others, one at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from training.detectors.locations import LocationTargets

STRIDES = (8, 16, 32, 64, 128)
K = 5


def objects(boxes: list[list[float]] | Tensor, classes: list[int] | None = None) -> Instances:
    instances = Instances((160, 192))
    instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes if classes is not None else [i % K for i in range(len(boxes))]).long()
    return instances


def levels(height: int = 160, width: int = 192, num_images: int = 1) -> list[Tensor]:
    return [torch.zeros(num_images, 1, math.ceil(height / s), math.ceil(width / s)) for s in STRIDES]


def locations(height: int = 160, width: int = 192) -> list[tuple[float, float, int]]:
    """Centre and stride of every cell, in the order of the levels and of their rows."""
    return [
        ((column + 0.5) * stride, (row + 0.5) * stride, stride)
        for stride in STRIDES
        for row in range(math.ceil(height / stride))
        for column in range(math.ceil(width / stride))
    ]


def features_of(num_images: int = 2, seed: int = 0, size: tuple[int, int] = (160, 192)) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(num_images, 32, *level.shape[-2:]) for level in levels(*size)]


def distances_of(values: list[float]) -> list[float]:
    """Of a box's four edges, from one value an edge or from the logits of a distribution an edge."""
    per_edge = len(values) // 4
    if per_edge == 1:
        return [max(value, 0.0) for value in values]
    distances = []
    for edge in range(4):
        powers = [math.exp(logit) for logit in values[edge * per_edge : (edge + 1) * per_edge]]
        distances.append(sum(step * power for step, power in enumerate(powers)) / sum(powers))
    return distances


class NoWaiting(TorchDispatchMode):
    """Fails on operators that make the processor wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "is_nonzero"), name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{name} with a mask"
        return func(*args, **(kwargs or {}))


def random_boxes(num_boxes: int, seed: int, step: float = 0.25) -> Tensor:
    """On a quarter-pixel raster, where distances and areas are exact and cells do touch edges."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num_boxes, 2, generator=generator) * torch.tensor([150.0, 120.0])
    sizes = torch.rand(num_boxes, 2, generator=generator).square() * 150
    boxes = torch.cat([corners, torch.minimum(corners + sizes, torch.tensor([192.0, 160.0]))], dim=1)
    return (boxes / step).round() * step


def compare_with(targets: LocationTargets, instances: Instances, matches: list[int | None]) -> int:
    """Labels, distances and centerness of one image against what follows from the matches; the number of positives."""
    boxes = instances.gt_boxes.tensor.tolist()
    for position, ((x, y, stride), match) in enumerate(zip(locations(), matches, strict=True)):
        label, edges, centerness = (values[0, position] for values in targets[:3])
        if match is None:
            assert (label, edges.tolist(), centerness) == (K, [0, 0, 0, 0], 0)
            continue
        left, top, right, bottom = (
            x - boxes[match][0], y - boxes[match][1], boxes[match][2] - x, boxes[match][3] - y
        )  # fmt: skip
        assert label == instances.gt_classes[match]
        assert edges.tolist() == pytest.approx([edge / stride for edge in (left, top, right, bottom)])
        expected = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
        assert centerness.item() == pytest.approx(expected, rel=1e-5)
    num_positives = sum(match is not None for match in matches)
    assert targets.num_positives == num_positives
    assert targets.sum_centerness.item() == pytest.approx(targets.centerness.sum().item())
    return num_positives
