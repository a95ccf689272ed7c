from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from export.average_precision import average_precision, coco_results, compressed_mask
from export.average_precision_interval import (
    ClassMatches,
    paired_interval,
    resampled_average_precision,
    weighted_average_precision,
)
from export.signature import Detections

NUM_IMAGES, CATEGORY_IDS, EDGE = 14, (3, 7, 9), 160


def random_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    corners = random.uniform(0, EDGE - 60, (count, 2))
    return np.concatenate([corners, corners + random.uniform(8, 60, (count, 2))], axis=1).astype(np.float32)


def random_truth(random: np.random.Generator) -> dict[str, Any]:
    """Crowds, images without objects, and a class that only one image has."""
    annotations = []
    for image_id in range(1, NUM_IMAGES + 1):
        for box in random_boxes(random, int(random.integers(0, 5))).astype(float):
            x1, y1, x2, y2 = box.tolist()
            is_crowd = bool(random.random() < 0.15)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(random.choice(CATEGORY_IDS[:2])),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(is_crowd),
                    "segmentation": compressed_mask(painted([x1, y1, x2, y2])),
                }
            )
    annotations[-1]["category_id"] = CATEGORY_IDS[2]
    annotations[-1]["iscrowd"] = 0
    return {
        "images": [{"id": i, "width": EDGE, "height": EDGE, "file_name": f"{i}.png"} for i in range(1, NUM_IMAGES + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in CATEGORY_IDS],
    }


def painted(box: Any) -> np.ndarray:
    """The pixels of a box, less a corner."""
    x1, y1, x2, y2 = (round(float(edge)) for edge in box)
    mask = np.zeros((EDGE, EDGE), bool)
    mask[y1:y2, x1:x2] = True
    mask[y1 : (y1 + y2) // 2, x1 : (x1 + x2) // 2] = False
    return mask


def random_detections(random: np.random.Generator, truth: dict[str, Any]) -> dict[int, Detections]:
    """Most objects a little off, some twice, some false, and no two scores alike."""
    found = {}
    for image_id in range(1, NUM_IMAGES + 1):
        objects = [a for a in truth["annotations"] if a["image_id"] == image_id]
        boxes = np.array([a["bbox"] for a in objects], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([CATEGORY_IDS.index(a["category_id"]) for a in objects], np.int32)
        keep = random.random(len(boxes)) < 0.9
        boxes = np.concatenate([boxes[keep], boxes[keep][:1], random_boxes(random, 3)])
        boxes = (boxes + random.normal(0, 2.5, boxes.shape)).clip(0, EDGE).astype(np.float32)
        labels = np.concatenate([labels[keep], labels[keep][:1], random.integers(0, 3, 3)]).astype(np.int32)
        scores = np.sort(random.random(len(boxes)).astype(np.float32))[::-1]
        found[image_id] = Detections(boxes=boxes, scores=scores, labels=labels)
    return found


@pytest.fixture(params=[0, 1])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[int, Detections]]:
    random = np.random.default_rng(request.param)
    truth = random_truth(random)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    return path, random_detections(random, truth)


def naive_average_precision(
    truth: dict[str, Any], results: list[dict[str, Any]], weights: np.ndarray, task: str
) -> tuple[float, list[float]]:
    """pycocotools on a data set that holds each image as often as its weight says: AP, and that of each class."""
    repeated: dict[str, Any] = {"images": [], "annotations": [], "categories": truth["categories"]}
    found: list[dict[str, Any]] = []
    for image_id, weight in enumerate(weights.tolist(), start=1):
        for _ in range(weight):
            new_id = len(repeated["images"]) + 1
            repeated["images"].append({**truth["images"][image_id - 1], "id": new_id})
            for annotation in (a for a in truth["annotations"] if a["image_id"] == image_id):
                number = len(repeated["annotations"]) + 1
                repeated["annotations"].append({**annotation, "image_id": new_id, "id": number})
            found += [{**copy.copy(r), "image_id": new_id} for r in results if r["image_id"] == image_id]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = repeated
        coco.createIndex()
        geometry = {"bbox": "bbox", "segm": "segmentation"}[task]
        judged = [{key: r[key] for key in ("image_id", "category_id", "score", geometry)} for r in found]
        evaluator = COCOeval(coco, coco.loadRes(judged), task)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    of_classes = [
        100 * float(precision[:, :, k].mean()) if precision[0, 0, k] > -1 else float("nan")
        for k in range(len(CATEGORY_IDS))
    ]
    return 100 * float(evaluator.stats[0]), of_classes


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_a_weighted_ap_is_pycocotools_on_the_data_set_with_repeated_images(
    case: tuple[Path, dict[int, Detections]], task: str
) -> None:
    path, found = case
    truth = json.loads(path.read_text())
    masks = {image_id: [compressed_mask(painted(box)) for box in d.boxes] for image_id, d in found.items()}
    matches = average_precision(path, found, CATEGORY_IDS, masks).matches[{"bbox": "AP", "segm": "segm_AP"}[task]]
    results = coco_results(found, CATEGORY_IDS, masks)
    random = np.random.default_rng(5)
    weights = random.multinomial(NUM_IMAGES, np.full(NUM_IMAGES, 1 / NUM_IMAGES), size=12)
    weights = np.concatenate([np.ones((1, NUM_IMAGES), int), weights]).astype(np.int32)
    of_classes = np.stack([weighted_average_precision(of_class, weights) for of_class in matches], axis=1)
    assert np.isnan(of_classes).any(), "a resample without the rare class is part of the test"
    for row, drawn in zip(of_classes, weights, strict=True):
        total, naive = naive_average_precision(truth, results, drawn, task)
        np.testing.assert_allclose(row, naive, rtol=1e-12)
        assert np.nanmean(row) == pytest.approx(total, rel=1e-12)


def test_resamples_are_drawn_alike_for_every_rung_and_centre_on_the_ap(
    case: tuple[Path, dict[int, Detections]],
) -> None:
    path, found = case
    evaluation = average_precision(path, found, CATEGORY_IDS)
    first, again = (resampled_average_precision(evaluation.matches["AP"]) for _ in range(2))
    assert first.shape == (1000, 3)
    np.testing.assert_array_equal(first, again)
    means = np.nanmean(first, axis=1)
    assert np.quantile(means, 0.05) < evaluation.scores["AP"] < np.quantile(means, 0.95)


def test_the_interval_of_equal_rungs_is_zero_and_that_of_a_small_change_is_narrower_than_the_aps(
    case: tuple[Path, dict[int, Detections]],
) -> None:
    path, found = case
    resampled = resampled_average_precision(average_precision(path, found, CATEGORY_IDS).matches["AP"])
    assert paired_interval(resampled, resampled) == (0.0, 0.0)
    less = {image_id: d if image_id != 2 else d.above(2.0) for image_id, d in found.items()}
    changed = average_precision(path, less, CATEGORY_IDS)
    other = resampled_average_precision(changed.matches["AP"])
    low, high = paired_interval(other, resampled)
    unpaired = np.subtract(*np.quantile(np.nanmean(resampled, axis=1), (0.975, 0.025)))
    assert low <= changed.scores["AP"] - average_precision(path, found, CATEGORY_IDS).scores["AP"] <= high
    assert high - low < 0.5 * unpaired


def test_what_every_image_loses_lies_clear_of_zero(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    truth = random_truth(random)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    exact = {}
    for image_id in range(1, NUM_IMAGES + 1):
        objects = [a for a in truth["annotations"] if a["image_id"] == image_id]
        boxes = np.array([a["bbox"] for a in objects], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([CATEGORY_IDS.index(a["category_id"]) for a in objects], np.int32)
        exact[image_id] = Detections(boxes=boxes, scores=np.full(len(boxes), 0.9, np.float32), labels=labels)
    moved = {
        image_id: Detections(boxes=d.boxes + np.float32(4), scores=d.scores, labels=d.labels)
        for image_id, d in exact.items()
    }
    before, after = (
        resampled_average_precision(average_precision(path, found, CATEGORY_IDS).matches["AP"])
        for found in (exact, moved)
    )
    low, high = paired_interval(after, before)
    assert low < high < -5


def test_a_class_without_detections_has_ap_zero_and_one_without_objects_none() -> None:
    nothing = np.zeros((10, 0), bool)
    images = np.zeros(0, np.int32)
    objects = ClassMatches(images=images, is_true=nothing, is_ignored=nothing, num_objects=np.array([1, 0]))
    weights = np.array([[1, 1], [2, 0], [0, 2]], np.int32)
    np.testing.assert_array_equal(weighted_average_precision(objects, weights), [0, 0, np.nan])
    low, high = paired_interval(np.full((5, 1), np.nan), np.full((5, 1), np.nan))
    assert np.isnan(low)
    assert np.isnan(high)
