"""The assignment of ATSS; its head, losses and inference are those of paper-style FCOS."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from dense_detectors import tiny_atss
from location_cases import compare_with, levels, locations, objects, random_boxes
from torch import Tensor

Box = list[float]


def naive_iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def naive_atss(boxes: list[Box], where: list[tuple[float, float, int]]) -> tuple[list[int | None], float]:
    """Which box each location belongs to, one box at a time; and how near any decision was to going the other way."""
    best: list[tuple[float, int | None]] = [(-1.0, None)] * len(where)
    margin = math.inf
    for index, box in enumerate(boxes):
        centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        candidates = []
        for stride in sorted({stride for _, _, stride in where}):
            level = [i for i, location in enumerate(where) if location[2] == stride]
            level.sort(key=lambda i: math.dist(where[i][:2], centre))
            candidates += level[:9]
        anchors = [(x - 4 * s, y - 4 * s, x + 4 * s, y + 4 * s) for x, y, s in (where[i] for i in candidates)]
        ious = [naive_iou(box, list(anchor)) for anchor in anchors]
        threshold = statistics.mean(ious) + (statistics.stdev(ious) if len(ious) > 1 else 0.0)
        for i, iou in zip(candidates, ious, strict=True):
            x, y, _ = where[i]
            if box[0] < x < box[2] and box[1] < y < box[3]:
                margin = min(margin, abs(iou - threshold))
                if iou >= threshold and iou > best[i][0]:
                    best[i] = (iou, index)
    return [index for _, index in best], margin


@pytest.mark.parametrize("seed", range(8))
def test_locations_learn_what_a_loop_over_boxes_and_their_candidates_gives_them(seed: int) -> None:
    # Off any raster: equal distances and IoUs at the threshold would be decided by rounding.
    boxes = random_boxes(12, seed, step=1e-4) + 1e-3 * torch.rand(12, 4, generator=torch.Generator().manual_seed(seed))
    instances = objects(boxes)
    targets = tiny_atss().label_locations(levels(), [instances])
    matches, margin = naive_atss(instances.gt_boxes.tensor.tolist(), locations())
    assert margin > 1e-6, "choose a seed without a decision within rounding"
    assert compare_with(targets, instances, matches) > 10


def labels_of(boxes: Tensor | list[Box], classes: list[int] | None = None) -> Tensor:
    return tiny_atss().label_locations(levels(), [objects(boxes, classes)]).labels[0]


def test_a_location_of_two_objects_takes_the_one_it_overlaps_more() -> None:
    # Both around the cell at (68, 68) of p3, whose anchor is 64 x 64 pixels there.
    near, far = [36.5, 36.25, 100.25, 100.5], [30.5, 34.25, 120.5, 110.75]
    position = locations().index((68.0, 68.0, 8))
    assert labels_of([near])[position] == labels_of([far])[position] == 0
    assert labels_of([near, far], [1, 2])[position] == 1
    assert labels_of([far, near], [2, 1])[position] == 1


def test_the_first_of_two_equal_objects_is_taken() -> None:
    box = [36.5, 36.25, 100.25, 100.5]
    labels = labels_of([box, box], [3, 4])
    assert (labels == 3).any()
    assert not (labels == 4).any()


def test_an_object_between_the_cells_centres_and_one_without_area_have_no_location() -> None:
    assert (labels_of([[33.0, 33.0, 35.0, 35.0], [50.0, 50.0, 50.0, 90.0]]) == 5).all()


def test_a_tiny_object_around_a_cells_centre_has_that_cell() -> None:
    labels = labels_of([[42.6, 43.1, 45.7, 45.2]], [2])
    assert labels[locations().index((44.0, 44.0, 8))] == 2


@pytest.mark.parametrize(("height", "width"), [(160, 192), (8, 8)])
def test_levels_with_fewer_cells_than_candidates_give_all_they_have(height: int, width: int) -> None:
    detector = tiny_atss()
    box = [0.3, 0.6, float(width) - 0.1, float(height) - 0.7]
    targets = detector.label_locations(levels(height, width), [objects([box])])
    matches, margin = naive_atss([objects([box]).gt_boxes.tensor[0].tolist()], locations(height, width))
    assert margin > 1e-6
    assert (targets.labels[0] == 0).tolist() == [match == 0 for match in matches]
    assert targets.num_positives > 0


def test_the_deviation_is_that_of_a_sample() -> None:
    # One cell of this box has an IoU between the thresholds of both deviations, by n - 1 and by n.
    box = [96.0 - 66.9675, 20.065, 96.0, 96.0]
    instances = objects([box])
    labels = tiny_atss().label_locations(levels(96, 96), [instances]).labels[0]
    matches, margin = naive_atss(instances.gt_boxes.tensor.tolist(), locations(96, 96))
    assert margin > 1e-3
    assert (labels == 0).tolist() == [match == 0 for match in matches]


def test_a_pyramid_of_one_location_gives_it_the_object() -> None:
    detector = tiny_atss()
    detector.strides = [128]
    targets = detector.label_locations([torch.zeros(1, 1, 1, 1)], [objects([[10.0, 20.0, 100.0, 110.0]], [4])])
    assert targets.labels.tolist() == [[4]]
    assert torch.isfinite(targets.centerness).all()


def test_without_objects_every_location_is_background() -> None:
    targets = tiny_atss().label_locations(levels(num_images=2), [objects([]), objects([])])
    assert (targets.labels == 5).all()
    assert (targets.num_positives, targets.sum_centerness) == (0, 0)
