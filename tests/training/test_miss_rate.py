"""MR⁻²: equal to a naive loop over boxes, and right by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.small_datasets import write_crowdhuman
from training.dataset import parsed
from training.dataset_config import DatasetConfig
from training.dataset_formats import own_datasets
from training.dataset_metrics import dataset_metrics
from training.miss_rate import crowdhuman_metrics, log_average_miss_rate

SIZE = (100, 80)
Box = list[float]


def document(images: list[tuple[list[Box], list[Box]]]) -> dict[str, Any]:
    """Images as (persons, ignore regions), boxes x, y, width, height."""
    annotations = [
        {"image_id": image_id, "category_id": 1, "bbox": box, "iscrowd": iscrowd}
        for image_id, parts in enumerate(images, start=1)
        for iscrowd, boxes in enumerate(parts)
        for box in boxes
    ]
    sizes = {"width": SIZE[0], "height": SIZE[1]}
    return {"images": [{"id": i, **sizes} for i in range(1, len(images) + 1)], "annotations": annotations}


def detection(image_id: int, box: Box, score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": 1, "bbox": box, "score": score}


def shared(a: Box, b: Box) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def naive(truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    """The benchmark's definition, box by box."""
    events: list[tuple[float, bool]] = []
    num_persons = sum(not each["iscrowd"] for each in truth["annotations"])
    for image in truth["images"]:
        mine = [each for each in truth["annotations"] if each["image_id"] == image["id"]]
        left = [each["bbox"] for each in mine if not each["iscrowd"]]
        regions = [each["bbox"] for each in mine if each["iscrowd"]]
        found = [each for each in results if each["image_id"] == image["id"]]
        for each in sorted(found, key=lambda each: each["score"], reverse=True):
            x, y, width, height = each["bbox"]
            x0, y0 = min(max(x, 0), SIZE[0]), min(max(y, 0), SIZE[1])
            x1, y1 = min(max(x + width, 0), SIZE[0]), min(max(y + height, 0), SIZE[1])
            box = [x0, y0, x1 - x0, y1 - y0]
            best, most = None, 0.5
            for person in left:
                both = shared(box, person)
                iou = both / (box[2] * box[3] + person[2] * person[3] - both)
                if iou > most:
                    best, most = person, iou
            if best is not None:
                left.remove(best)
                events.append((each["score"], True))
            elif not any(shared(box, region) / (box[2] * box[3]) > 0.5 for region in regions):
                events.append((each["score"], False))
    events.sort(key=lambda event: event[0], reverse=True)
    rates, curve, area, true, false = [], [], 0.0, 0, 0
    for _, is_true in events:
        true, false = true + is_true, false + (not is_true)
        curve.append((false / len(truth["images"]), true / num_persons, true / (true + false)))
    for (_, recall, precision), (_, next_recall, next_precision) in itertools.pairwise(curve):
        area += (next_recall - recall) * (precision + next_precision) / 2
    for rate in (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0):
        reached = [recall for per_image, recall, _ in curve if per_image >= rate]
        rates.append(1 - (reached[0] if reached else curve[-1][1]))
    product = math.prod(max(rate, 1e-10) for rate in rates)
    return {
        "mMR": 100 * product ** (1 / 9), "CrowdHuman_AP50": 100 * area, "CrowdHuman_recall": 100 * curve[-1][1]
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_the_metric_is_that_of_a_naive_loop(seed: int) -> None:
    generator = np.random.default_rng(seed)

    def boxes(number: int) -> list[Box]:
        corners = generator.uniform(0, [60, 40], (number, 2))
        return np.concatenate([corners, generator.uniform(8, 40, (number, 2))], axis=1).tolist()

    truth = document([(boxes(int(generator.integers(0, 9))), boxes(int(generator.integers(0, 3)))) for _ in range(12)])
    results = []
    for each in [*truth["annotations"], *truth["annotations"]]:
        shaken = np.array(each["bbox"]) + generator.normal(0, 2, 4)
        results.append(detection(each["image_id"], np.maximum(shaken, [-9, -9, 2, 2]).tolist(), generator.random()))
    results += [detection(1 + index % 12, box, 0.7 * generator.random()) for index, box in enumerate(boxes(30))]
    found, expected = crowdhuman_metrics(truth, results), naive(truth, results)
    assert 5 < expected["mMR"] < 95
    assert found == pytest.approx(expected)


def test_perfect_detections_miss_nothing_and_none_miss_everything() -> None:
    truth = document([([[1, 1, 20, 40], [30, 1, 20, 40]], [[60, 0, 30, 30]]), ([[5, 5, 10, 30]], [])])
    perfect = [detection(each["image_id"], each["bbox"], 0.9) for each in truth["annotations"]]
    found = crowdhuman_metrics(truth, perfect)
    assert found["mMR"] == pytest.approx(0, abs=1e-6)
    assert found["CrowdHuman_recall"] == 100
    assert crowdhuman_metrics(truth, []) == {"mMR": 100.0, "CrowdHuman_AP50": 0.0, "CrowdHuman_recall": 0.0}
    nobody = document([([], [[0, 0, 9, 9]])])
    assert all(math.isnan(value) for value in crowdhuman_metrics(nobody, perfect[:1]).values())


def test_half_of_the_persons_and_no_false_positive_is_a_miss_rate_of_half() -> None:
    truth = document([([[1, 1, 20, 40], [30, 1, 20, 40]], [])] * 3)
    found = [detection(image_id, [1, 1, 20, 40], 0.9) for image_id in (1, 2, 3)]
    assert crowdhuman_metrics(truth, found)["mMR"] == pytest.approx(50)


def test_the_miss_rate_is_read_where_each_rate_of_false_positives_is_reached() -> None:
    # Two images: the false positives come at 0.5 and 1 per image, with one person of four found before each.
    truth = document([([[0, 0, 10, 10], [20, 0, 10, 10]], []), ([[0, 0, 10, 10], [20, 0, 10, 10]], [])])
    found = [
        detection(1, [0, 0, 10, 10], 0.9),
        detection(1, [60, 60, 10, 10], 0.8),
        detection(2, [0, 0, 10, 10], 0.7),
        detection(2, [60, 60, 10, 10], 0.6),
        detection(2, [20, 0, 10, 10], 0.5),
    ]
    # Seven points up to 0.3162 read the first false positive (3 of 4 missed), 0.5623 and 1 the second (2 of 4).
    expected = 100 * (0.75**7 * 0.5**2) ** (1 / 9)
    assert crowdhuman_metrics(truth, found)["mMR"] == pytest.approx(expected)


def test_a_rate_that_is_never_reached_is_read_at_the_end() -> None:
    assert log_average_miss_rate(np.array([0.5, 0.25]), np.array([0.0, 0.0])) == pytest.approx(0.25)


def test_a_detection_in_an_ignore_region_counts_neither_way_and_half_in_it_is_wrong() -> None:
    truth = document([([[0, 0, 10, 20]], [[50, 0, 40, 40]])])
    person = detection(1, [0, 0, 10, 20], 0.5)
    inside = detection(1, [60, 5, 4, 4], 0.9)  # a small part of the region, but wholly in it
    half = detection(1, [45, 5, 10, 10], 0.9)  # exactly half in it: not more than half
    clean = crowdhuman_metrics(truth, [person])
    assert crowdhuman_metrics(truth, [person, inside, inside]) == clean
    assert crowdhuman_metrics(truth, [person, half])["mMR"] > clean["mMR"] + 10


def test_a_person_inside_an_ignore_region_can_be_found_once() -> None:
    truth = document([([[55, 5, 10, 20], [0, 0, 10, 20]], [[50, 0, 40, 40]])])
    once = detection(1, [55, 5, 10, 20], 0.9)
    assert crowdhuman_metrics(truth, [once])["CrowdHuman_recall"] == 50
    assert crowdhuman_metrics(truth, [once, once]) == crowdhuman_metrics(truth, [once]), "the second one is ignored"


def test_a_detection_takes_the_next_best_person_when_the_best_is_taken() -> None:
    truth = document([([[0, 0, 10, 20], [0, 4, 10, 20]], [])])
    same = [detection(1, [0, 1, 10, 20], 0.9), detection(1, [0, 1, 10, 20], 0.8)]
    assert crowdhuman_metrics(truth, same)["CrowdHuman_recall"] == 100


def test_detections_beyond_the_image_are_clipped_like_the_truth(tmp_path: Path) -> None:
    odgt = write_crowdhuman(tmp_path)
    config = DatasetConfig(format="crowdhuman", train=str(odgt), validation=str(odgt))
    dataset = own_datasets(config)["validation"].usable(tmp_path / "instances.json")
    truth = parsed(dataset.annotation_file)
    full_boxes = [[5, 5, 20, 40], [18, 4, 22, 44], [-10, 8, 30, 70], [4, 4, 16, 36], [24, 6, 14, 34]]
    images = [each["image_id"] for each in truth["annotations"] if not each["iscrowd"]]
    results = [detection(image_id, box, 0.9) for image_id, box in zip(images, full_boxes, strict=True)]
    assert dataset_metrics(dataset, results)["CrowdHuman_recall"] == 100
    assert dataset_metrics(dataset, results)["mMR"] == pytest.approx(0, abs=1e-6)
