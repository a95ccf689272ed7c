"""CrowdHuman's metric: log-average miss rate (MR⁻²), with AP50 and recall of the same matching.

Dollar et al., "Pedestrian Detection: An Evaluation of the State of the Art", PAMI 2012; Shao et al., "CrowdHuman",
2018. The matching and the curve are those of CrowdHuman's evaluation code: IoU above 0.5, a person is found once, and a
detection that finds none is left out when more than half of its own area lies in one ignore region.

Boxes are x, y, width, height in image pixels.

Shape legend: D detections and P persons of one image, R its ignore regions; N detections of all images that count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

# 10^-2 to 10^0 in nine equal steps of the logarithm, rounded as CrowdHuman's code has them.
FALSE_POSITIVES_PER_IMAGE = (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0)
MIN_IOU = 0.5
_MIN_MISS_RATE = 1e-10  # as in Dollar's code, so that the logarithm exists


def crowdhuman_metrics(document: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``mMR`` (lower is better), ``CrowdHuman_AP50`` and ``CrowdHuman_recall`` in percent; NaN without any person.

    Args:
        document: COCO document whose boxes lie inside their images; annotations with ``iscrowd`` are ignore regions.
        results: detections in COCO's results format; they are clipped to their images too.

    Without detections the miss rate is 100. AP50 is, as in CrowdHuman's code, the area under the plain curve of
    precision over recall by the trapezoid rule, from its first point on.

    Deviation: CrowdHuman's code clips left and top edges to the last pixel instead of the border, has no number for a
    set without detections, and gives 0 when the miss rate is 0 at one of the nine points.
    """
    persons, ignored = _boxes_by_image(document)
    num_persons = sum(len(boxes) for boxes in persons.values())
    by_image: dict[int, list[Mapping[str, Any]]] = {}
    for result in results:
        by_image.setdefault(result["image_id"], []).append(result)
    scores, is_true = [np.zeros(0)], [np.zeros(0, bool)]
    for image in document["images"]:
        found = by_image.get(image["id"])
        if not found:
            continue
        boxes = _clipped(_array([each["bbox"] for each in found]), image["width"], image["height"])
        confidences = np.array([each["score"] for each in found], np.float64)
        order = np.argsort(-confidences, kind="stable")
        status = match(boxes[order], persons[image["id"]], ignored[image["id"]])
        scores.append(confidences[order][status >= 0])
        is_true.append(status[status >= 0] == 1)
    if num_persons == 0:
        return dict.fromkeys(("mMR", "CrowdHuman_AP50", "CrowdHuman_recall"), float("nan"))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    num_true = np.cumsum(np.concatenate(is_true)[order])
    num_false = np.arange(1, len(order) + 1) - num_true
    recall, precision = num_true / num_persons, num_true / (num_true + num_false)
    return {
        "mMR": 100 * log_average_miss_rate(1 - recall, num_false / len(document["images"])),
        "CrowdHuman_AP50": 100 * float(np.sum(np.diff(recall) * (precision[1:] + precision[:-1]) / 2)),
        "CrowdHuman_recall": 100 * float(recall[-1] if len(recall) else 0.0),
    }


def log_average_miss_rate(miss_rate: np.ndarray, false_positives_per_image: np.ndarray) -> float:
    """Geometric mean of the miss rate at nine rates of false positives, each read where the curve first reaches it.

    Args:
        miss_rate: (N,), after each detection in falling order of score.
        false_positives_per_image: (N,), not falling. A rate that it never reaches is read at its end.
    """
    if not len(miss_rate):
        return 1.0
    reached = np.searchsorted(false_positives_per_image, FALSE_POSITIVES_PER_IMAGE, side="left")
    at = miss_rate[np.minimum(reached, len(miss_rate) - 1)]
    return float(np.exp(np.log(np.maximum(at, _MIN_MISS_RATE)).mean()))


def match(detections: np.ndarray, persons: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """What each detection of one image is: 1 finds a person, 0 is wrong, -1 lies in an ignore region.

    Args:
        detections: (D, 4) in falling order of score; each takes the person it overlaps most of those left.
        persons: (P, 4).
        ignored: (R, 4).

    Returns:
        (D,)
    """
    status = np.zeros(len(detections), np.int64)
    if len(ignored):  # as crowd regions: the shared area over the detection's own
        covered = coco_mask.iou(detections, ignored, [True] * len(ignored))
        status[covered.max(axis=1) > MIN_IOU] = -1
    if not len(persons):
        return status
    iou = coco_mask.iou(detections, persons, [False] * len(persons))
    for index in range(len(detections)):
        best = iou[index].argmax()
        if iou[index, best] > MIN_IOU:
            status[index] = 1
            iou[:, best] = 0
    return status


def _boxes_by_image(document: Mapping[str, Any]) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Persons and ignore regions of each image, (n, 4)."""
    split: tuple[dict[int, list[Any]], ...] = ({}, {})
    for image in document["images"]:
        for part in split:
            part[image["id"]] = []
    for each in document["annotations"]:
        split[int(bool(each["iscrowd"]))][each["image_id"]].append(each["bbox"])
    persons, ignored = ({image_id: _array(boxes) for image_id, boxes in part.items()} for part in split)
    return persons, ignored


def _array(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array(boxes, np.float64).reshape(-1, 4)


def _clipped(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    low, high = (np.clip(corner, 0, [width, height]) for corner in (boxes[:, :2], boxes[:, :2] + boxes[:, 2:]))
    return np.concatenate([low, high - low], axis=1)
