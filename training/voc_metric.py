"""Average precision as Pascal VOC's development kit defines it, over COCO-format annotations with ``difficult``.

Equal to detectron2's ``PascalVOCDetectionEvaluator``. Its boxes are inclusive pixels, its overlaps add 1 to each side
and its detections move by one pixel to meet them: on the continuous boxes of :mod:`training.voc_dataset` that is the
plain intersection over union.

Shape legend: D detections and G objects of one class, in all images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

IOU_THRESHOLDS = np.arange(50, 100, 5) / 100
_RECALLS = np.arange(0.0, 1.1, 0.1)


def voc_metrics(
    document: Mapping[str, Any], results: Sequence[Mapping[str, Any]], *, use_11_points: bool
) -> dict[str, float]:
    """``VOC_AP`` (mean over IoU 0.50:0.95), ``VOC_AP50``, ``VOC_AP75`` and ``VOC_AP50_area`` in percent.

    Args:
        document: COCO document; detections of annotations with ``difficult`` count neither way.
        results: detections in COCO's results format, boxes (x, y, width, height) in image pixels.
        use_11_points: mean precision at 11 recalls, the rule of 2007; otherwise the area under the curve.
            ``VOC_AP50_area`` is the area in both cases.

    Deviation: detectron2 rounds scores to 3 and boxes to 1 decimals and gives no number at all when a class has no
    object; here nothing is rounded, and classes without an object are left out of the mean. NaN when all are.
    """
    truth: dict[int, dict[int, list[Mapping[str, Any]]]] = {each["id"]: {} for each in document["categories"]}
    for each in document["annotations"]:
        truth[each["category_id"]].setdefault(each["image_id"], []).append(each)
    detections: dict[int, list[Mapping[str, Any]]] = {}
    for result in results:
        detections.setdefault(result["category_id"], []).append(result)
    values: dict[str, list[float]] = {"asked": [], "50": [], "75": [], "area": []}
    for category_id, by_image in truth.items():
        overlaps, matched, is_difficult = _best_matches(by_image, detections.get(category_id, []))
        num_objects = int((~is_difficult).sum())
        if num_objects == 0:
            continue
        curves = [_curve(overlaps, matched, is_difficult, threshold, num_objects) for threshold in IOU_THRESHOLDS]
        asked = [voc_ap(*curve, use_11_points=use_11_points) for curve in curves]
        values["asked"] += asked
        values["50"].append(asked[0])
        values["75"].append(asked[5])
        values["area"].append(voc_ap(*curves[0], use_11_points=False))
    names = {"VOC_AP": "asked", "VOC_AP50": "50", "VOC_AP75": "75", "VOC_AP50_area": "area"}
    return {name: 100 * float(np.mean(values[key])) if values[key] else float("nan") for name, key in names.items()}


def voc_ap(recall: np.ndarray, precision: np.ndarray, *, use_11_points: bool) -> float:
    """AP from 0 to 1 of a curve, one point a detection in falling order of score."""
    if use_11_points:
        return float(sum(precision[recall >= r].max(initial=0.0) for r in _RECALLS) / len(_RECALLS))
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.concatenate(([0.0], precision, [0.0]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))


def _best_matches(
    by_image: Mapping[int, Sequence[Mapping[str, Any]]], detections: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The object that each detection overlaps most, which in VOC does not depend on what others found.

    Returns:
        Overlap (D,), minus infinity where the image has no object; index of that object (D,); whether each object is
        difficult (G,). Detections are in falling order of score, equal scores in the order given.
    """
    offsets: dict[int, int] = {}
    boxes: dict[int, np.ndarray] = {}
    is_difficult: list[bool] = []
    for image_id, objects in by_image.items():
        offsets[image_id] = len(is_difficult)
        boxes[image_id] = np.array([each["bbox"] for each in objects], np.float64)
        is_difficult += [bool(each.get("difficult", 0)) for each in objects]
    in_order = sorted(detections, key=lambda each: -each["score"])
    positions: dict[int, list[int]] = {}
    for position, each in enumerate(in_order):
        positions.setdefault(each["image_id"], []).append(position)
    overlaps, matched = np.full(len(in_order), -np.inf), np.zeros(len(in_order), np.int64)
    for image_id in boxes.keys() & positions.keys():
        at = positions[image_id]
        own = np.array([in_order[position]["bbox"] for position in at], np.float64)
        found = coco_mask.iou(own, boxes[image_id], [False] * len(boxes[image_id]))
        overlaps[at] = found.max(axis=1)
        matched[at] = offsets[image_id] + found.argmax(axis=1)
    return overlaps, matched, np.array(is_difficult, bool)


def _curve(
    overlaps: np.ndarray, matched: np.ndarray, is_difficult: np.ndarray, threshold: float, num_objects: int
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision after each detection (D,). The first to find an object is right, further ones are wrong."""
    is_hit = overlaps > threshold
    counts = ~is_hit
    is_true = np.zeros(len(overlaps), bool)
    if is_hit.any():
        to_ordinary = is_hit.copy()
        to_ordinary[is_hit] = ~is_difficult[matched[is_hit]]
        positions = np.flatnonzero(to_ordinary)
        first = positions[np.unique(matched[positions], return_index=True)[1]]
        is_true[first] = True
        counts |= to_ordinary
    num_true, num_false = np.cumsum(is_true), np.cumsum(counts & ~is_true)
    precision = num_true / np.maximum(num_true + num_false, np.finfo(np.float64).eps)
    return num_true / num_objects, precision
