"""The assignment of FCOS as the LGD paper trains it."""

from __future__ import annotations

import math

import pytest
from dense_detectors import tiny_paper_fcos
from location_cases import compare_with, levels, locations, objects, random_boxes


def naive_fcos(boxes: list[list[float]], x: float, y: float, stride: int) -> int | None:
    """Which box a location belongs to, one location and one box at a time."""
    smallest, found = math.inf, None
    low, high = {8: (-1, 64), 16: (64, 128), 32: (128, 256), 64: (256, 512), 128: (512, math.inf)}[stride]
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        if not (x1 < x < x2 and y1 < y < y2):
            continue
        if abs(x - (x1 + x2) / 2) >= 1.5 * stride or abs(y - (y1 + y2) / 2) >= 1.5 * stride:
            continue
        if not low <= max(x - x1, y - y1, x2 - x, y2 - y) <= high:
            continue
        if (area := (x2 - x1) * (y2 - y1)) < smallest:
            smallest, found = area, index
    return found


@pytest.mark.parametrize("seed", range(6))
def test_locations_learn_what_a_loop_over_locations_and_boxes_gives_them(seed: int) -> None:
    instances = objects(random_boxes(12, seed))
    targets = tiny_paper_fcos().label_locations(levels(), [instances])
    boxes = instances.gt_boxes.tensor.tolist()
    assert compare_with(targets, instances, [naive_fcos(boxes, *where) for where in locations()]) > 10


@pytest.mark.parametrize(
    ("boxes", "some"),
    [
        ([[20, 20, 60, 60], [20, 20, 60, 60]], True),  # the same area: the first
        ([[20, 20, 60, 60], [22, 22, 58, 58]], True),  # the smaller
        ([[12, 12, 140, 28]], True),  # a location at 64 pixels from an edge belongs to both levels
        ([[19, 19, 21, 21], [100, 100, 104, 104]], True),  # tiny, with a cell's centre inside or not
        ([[33, 33, 35, 35]], False),
        ([[20, 20, 20, 60], [50, 50, 50, 50]], False),  # no area
        ([[152, 120, 192, 160]], True),  # at the border
        ([], False),
    ],
)
def test_ties_tiny_boxes_and_borders_are_as_in_the_loop(boxes: list[list[float]], some: bool) -> None:
    instances = objects(boxes)
    targets = tiny_paper_fcos().label_locations(levels(), [instances])
    num_positives = compare_with(targets, instances, [naive_fcos(boxes, *where) for where in locations()])
    assert (num_positives > 0) == some
