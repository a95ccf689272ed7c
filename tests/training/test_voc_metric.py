"""VOC average precision: equal to detectron2's evaluator on the same files, and right by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_ap as detectron2_ap
from detectron2.structures import Boxes, Instances

from tests.training.small_datasets import write_voc_set
from training.dataset import CocoDataset, detectron2_dicts, parsed
from training.dataset_config import DatasetConfig
from training.dataset_formats import own_datasets
from training.dataset_metrics import dataset_metrics
from training.voc_metric import voc_ap, voc_metrics

CLASSES = ("cat", "dog", "person")


def small_set(tmp_path: Path, year: int) -> CocoDataset:
    named = write_voc_set(tmp_path / f"VOC{year}")
    config = DatasetConfig(format="voc", train=named, validation=named, classes=CLASSES)
    return own_datasets(config)["validation"].usable(tmp_path / "instances.json")


def noisy_detections(dataset: CocoDataset, seed: int) -> list[dict[str, Any]]:
    """Several shaken copies of each object and some strays; whole-pixel boxes and scores of 3 decimals, all other."""
    generator = np.random.default_rng(seed)
    found = []
    for record in detectron2_dicts(dataset):
        for entry in [*record["annotations"]] * 3:
            shaken = np.array(entry["bbox"]) + generator.integers(-4, 5, 4)
            label = entry["category_id"] if generator.random() < 0.8 else int(generator.integers(3))
            found.append((record["image_id"], label, np.maximum(shaken, [0, 0, 1, 1])))
        found.append((record["image_id"], int(generator.integers(3)), generator.integers(1, 40, 4)))
    scores = generator.permutation(1000)[: len(found)] / 1000
    return [
        {"image_id": image_id, "category_id": label + 1, "bbox": box.astype(float).tolist(), "score": float(score)}
        for (image_id, label, box), score in zip(found, scores, strict=True)
    ]


def by_detectron2(folder: Path, year: int, dataset: CocoDataset, results: list[dict[str, Any]]) -> dict[str, float]:
    """What detectron2's evaluator says, from the XML files."""
    name = f"voc-metric-{folder}"
    MetadataCatalog.get(name).set(dirname=str(folder), split="trainval", year=year, thing_classes=list(CLASSES))
    evaluator = PascalVOCDetectionEvaluator(name)
    evaluator.reset()
    for record in detectron2_dicts(dataset):
        mine = [each for each in results if each["image_id"] == record["image_id"]]
        boxes = torch.tensor([each["bbox"] for each in mine], dtype=torch.float64).reshape(-1, 4)
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        instances.scores = torch.tensor([each["score"] for each in mine], dtype=torch.float64)
        instances.pred_classes = torch.tensor([each["category_id"] - 1 for each in mine], dtype=torch.int64)
        evaluator.process([{"image_id": Path(record["file_name"]).stem}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("seed", range(4))
def test_the_metric_is_that_of_detectron2(tmp_path: Path, year: int, seed: int) -> None:
    dataset = small_set(tmp_path, year)
    results = noisy_detections(dataset, seed)
    found = dataset_metrics(dataset, results)
    expected = by_detectron2(tmp_path / f"VOC{year}", year, dataset, results)
    assert 0 < expected["AP"] < expected["AP50"] < 100
    assert [found[f"VOC_{key}"] for key in ("AP", "AP50", "AP75")] == pytest.approx(
        [expected[key] for key in ("AP", "AP50", "AP75")]
    )
    area = voc_metrics(parsed(dataset.annotation_file), results, use_11_points=False)
    assert found["VOC_AP50_area"] == area["VOC_AP50"] == area["VOC_AP50_area"]
    assert (found["VOC_AP50"] == found["VOC_AP50_area"]) == (year == 2012)


def test_the_curve_is_read_as_detectron2_reads_it() -> None:
    generator = np.random.default_rng(0)
    for num_detections in (0, 1, 7, 40):
        is_true = generator.random(num_detections) < 0.5
        recall = np.cumsum(is_true) / max(is_true.sum() + 2, 1)
        precision = np.cumsum(is_true) / np.arange(1, num_detections + 1)
        for use_11_points in (False, True):
            assert voc_ap(recall, precision, use_11_points=use_11_points) == pytest.approx(
                detectron2_ap(recall, precision, use_11_points)
            )


def document(objects: list[tuple[int, list[float], int]]) -> dict[str, Any]:
    """One class in images 1 and 2; objects as (image, box, difficult)."""
    return {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "never seen"}],
        "annotations": [
            {"image_id": image_id, "category_id": 1, "bbox": box, "difficult": difficult}
            for image_id, box, difficult in objects
        ],
    }


def detection(image_id: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": 1, "bbox": box, "score": score}


def test_a_second_find_is_wrong_and_a_difficult_one_counts_neither_way() -> None:
    truth = document([(1, [0, 0, 10, 10], 0), (2, [0, 0, 10, 10], 0), (2, [50, 50, 10, 10], 1)])
    found = [
        detection(2, [50, 50, 10, 10], 0.9),  # difficult: no effect
        detection(1, [0, 0, 10, 10], 0.8),
        detection(1, [0, 0, 10, 10], 0.7),  # again: wrong
        detection(2, [0, 0, 10, 10], 0.6),
    ]
    # Precision 1 up to recall 1/2, then 2/3 up to recall 1.
    assert voc_metrics(truth, found, use_11_points=False)["VOC_AP50"] == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))
    assert voc_metrics(truth, found, use_11_points=True)["VOC_AP50"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)


def test_an_overlap_of_exactly_the_threshold_is_no_find() -> None:
    truth = document([(1, [0, 0, 10, 10], 0)])
    assert voc_metrics(truth, [detection(1, [0, 0, 10, 5], 0.9)], use_11_points=False)["VOC_AP50"] == 0
    assert voc_metrics(truth, [detection(1, [0, 0, 10, 5.1], 0.9)], use_11_points=False)["VOC_AP50"] == 100


def test_nothing_found_is_zero_and_nothing_to_find_is_no_number() -> None:
    truth = document([(1, [0, 0, 10, 10], 0)])
    assert set(voc_metrics(truth, [], use_11_points=True).values()) == {0.0}
    only_difficult = document([(1, [0, 0, 10, 10], 1)])
    assert all(math.isnan(value) for value in voc_metrics(only_difficult, [], use_11_points=False).values())


def test_perfect_detections_have_100_and_the_standard_classes_without_objects_do_not_count(tmp_path: Path) -> None:
    named = write_voc_set(tmp_path / "VOC2007")
    config = DatasetConfig(format="voc", train=named, validation=named)
    dataset = own_datasets(config)["validation"].usable(tmp_path / "instances.json")
    assert dataset.class_names == CLASS_NAMES
    truth = parsed(dataset.annotation_file)["annotations"]
    results = [{**{key: each[key] for key in ("image_id", "category_id", "bbox")}, "score": 1.0} for each in truth]
    assert set(dataset_metrics(dataset, results).values()) == {100.0}
