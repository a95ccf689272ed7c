"""COCO average precision of detections in original image pixels; pycocotools is the arbiter.

Shape legend of ``COCOeval.eval["precision"]``: T IoU thresholds, P recall points, K classes, A area ranges, M limits on
the number of detections.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from export.signature import Detections

_ROWS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR100": 8}


def average_precision(
    annotation_file: Path, detections: Mapping[int, Detections], category_ids: Sequence[int]
) -> dict[str, float]:
    """COCO box AP over every image of the annotation file.

    Args:
        annotation_file: COCO-format ground truth.
        detections: by image id, boxes in original image pixels. An image that is missing counts as one without
            detections, so a subset of images needs an annotation file of its own.
        category_ids: the data set's category id of each label.

    Returns:
        ``AP, AP50, AP75, APs, APm, APl, AR100`` in percent; NaN where there is no ground truth of that size.
    """
    stats = _evaluated(annotation_file, detections, category_ids).stats
    return {name: _percent(stats[row]) for name, row in _ROWS.items()}


def per_class_average_precision(
    annotation_file: Path, detections: Mapping[int, Detections], category_ids: Sequence[int]
) -> dict[int, float]:
    """COCO box AP of each category id in percent; NaN where a class has no ground truth."""
    evaluator = _evaluated(annotation_file, detections, category_ids)
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # (T, P, K), all areas, 100 detections
    result = {}
    for index, category_id in enumerate(evaluator.params.catIds):
        values = precision[:, :, index]
        values = values[values > -1]
        result[int(category_id)] = 100 * float(values.mean()) if values.size else float("nan")
    return result


def coco_results(detections: Mapping[int, Detections], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections as COCO's list of results, boxes as (x, y, width, height)."""
    return [
        {
            "image_id": image_id,
            "category_id": int(category_ids[label]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image_id, found in detections.items()
        for (x1, y1, x2, y2), score, label in zip(
            found.boxes.astype(np.float64).tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
        )
    ]


def _evaluated(annotation_file: Path, detections: Mapping[int, Detections], category_ids: Sequence[int]) -> COCOeval:
    truth = COCO()
    truth.dataset = json.loads(annotation_file.read_text())
    for annotation in truth.dataset["annotations"]:
        annotation.setdefault("iscrowd", 0)  # optional in the format, required by pycocotools
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    unknown = set(detections) - {image["id"] for image in truth.dataset["images"]}
    if unknown:
        raise ValueError(
            f"average precision: {len(unknown)} images with detections are not in {annotation_file}, "
            f"such as image id {min(unknown)}"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth.createIndex()
        evaluator = COCOeval(truth, _loaded(truth, coco_results(detections, category_ids)), "bbox")
        evaluator.params.catIds = sorted(category_ids)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def _loaded(truth: COCO, results: list[dict[str, Any]]) -> COCO:
    if results:
        return truth.loadRes(results)
    nothing = COCO()  # ``loadRes`` fails on an empty list
    nothing.dataset = {**copy.copy(truth.dataset), "annotations": []}
    nothing.createIndex()
    return nothing


def _percent(value: float) -> float:
    return 100 * float(value) if value > -1 else float("nan")
