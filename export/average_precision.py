"""COCO average precision of detections in original image pixels; pycocotools is the arbiter.

Shape legend of ``COCOeval.eval["precision"]``: T IoU thresholds, P recall points, K classes, A area ranges, M limits on
the number of detections.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from export.average_precision_interval import ClassMatches, class_matches
from export.signature import Detections

Segmentations = Mapping[int, Sequence[dict[str, Any]]]  # by image id, in COCO's run-length encoding

Task = Literal["bbox", "segm"]

TASKS: Mapping[str, Task] = {"": "bbox", "segm_": "segm"}  # by the prefix of their metrics
_ROWS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR100": 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """COCO's verdict on detections.

    Attributes:
        scores: ``AP, AP50, AP75, APs, APm, APl, AR100`` in percent, NaN where there is no ground truth of that size;
            with masks also ``segm_AP`` and so on, of the masks.
        per_class: under ``AP``, and with masks ``segm_AP``, that of each category id in percent; NaN without objects.
        matches: under the same names, what AP on resampled images is computed from, a class each, by category id.
    """

    scores: dict[str, float]
    per_class: dict[str, dict[int, float]]
    matches: dict[str, list[ClassMatches]]


def average_precision(
    annotation_file: Path,
    detections: Mapping[int, Detections],
    category_ids: Sequence[int],
    segmentations: Segmentations | None = None,
) -> Evaluation:
    """Evaluate boxes, and masks where there are any, over every image of the annotation file.

    Args:
        annotation_file: COCO-format ground truth.
        detections: by image id, boxes in original image pixels. An image that is missing counts as one without
            detections, so a subset of images needs an annotation file of its own.
        category_ids: the data set's category id of each label.
        segmentations: of each image, the masks of its detections, in their order.
    """
    results = coco_results(detections, category_ids, segmentations)
    found = Evaluation(scores={}, per_class={}, matches={})
    for prefix, task in TASKS.items():
        if task == "segm" and segmentations is None:
            continue
        evaluator = _evaluated(annotation_file, results, category_ids, task)
        found.scores.update({f"{prefix}{name}": _percent(evaluator.stats[row]) for name, row in _ROWS.items()})
        found.per_class[f"{prefix}AP"] = _per_class(evaluator)
        found.matches[f"{prefix}AP"] = class_matches(evaluator)
    return found


def _per_class(evaluator: COCOeval) -> dict[int, float]:
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # (T, P, K), all areas, 100 detections
    result = {}
    for index, category_id in enumerate(evaluator.params.catIds):
        values = precision[:, :, index]
        values = values[values > -1]
        result[int(category_id)] = 100 * float(values.mean()) if values.size else float("nan")
    return result


def coco_results(
    detections: Mapping[int, Detections], category_ids: Sequence[int], segmentations: Segmentations | None = None
) -> list[dict[str, Any]]:
    """Detections as COCO's list of results, boxes as (x, y, width, height), with ``segmentation`` where it is given."""
    results = [
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
    if segmentations is not None:
        masks = [mask for image_id in detections for mask in segmentations[image_id]]
        for result, mask in zip(results, masks, strict=True):
            result["segmentation"] = mask
    return results


def compressed_mask(mask: np.ndarray) -> dict[str, Any]:
    """An (H, W) bool mask as COCO's compressed run-length encoding, which JSON can hold."""
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(edge) for edge in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def _evaluated(
    annotation_file: Path, results: list[dict[str, Any]], category_ids: Sequence[int], task: Task
) -> COCOeval:
    truth = COCO()
    truth.dataset = json.loads(annotation_file.read_text())
    for annotation in truth.dataset["annotations"]:
        annotation.setdefault("iscrowd", 0)  # optional in the format, required by pycocotools
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    unknown = {result["image_id"] for result in results} - {image["id"] for image in truth.dataset["images"]}
    if unknown:
        raise ValueError(
            f"average precision: {len(unknown)} images with detections are not in {annotation_file}, "
            f"such as image id {min(unknown)}"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth.createIndex()
        evaluator = COCOeval(truth, _loaded(truth, _judged_by(results, task)), task)
        evaluator.params.catIds = sorted(category_ids)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def _judged_by(results: list[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
    """Copies, as pycocotools adds to them, with either the box or the mask, from which it takes the area."""
    geometry = {"bbox": "bbox", "segm": "segmentation"}[task]
    return [{key: result[key] for key in ("image_id", "category_id", "score", geometry)} for result in results]


def _loaded(truth: COCO, results: list[dict[str, Any]]) -> COCO:
    if results:
        return truth.loadRes(results)
    nothing = COCO()  # ``loadRes`` fails on an empty list
    nothing.dataset = {**copy.copy(truth.dataset), "annotations": []}
    nothing.createIndex()
    return nothing


def _percent(value: float) -> float:
    return 100 * float(value) if value > -1 else float("nan")
