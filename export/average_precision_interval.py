"""How far AP, and the difference of two APs, would move with other images: a paired bootstrap over images.

A resample draws as many images as there are, with replacement. What COCOeval matched within an image stays as it is, so
a resample is one integer weight an image, and COCO's accumulation runs on weighted detections: for all resamples of a
class at once, and only at true positives, as precision is interpolated from there. Equal to pycocotools on a data set
that repeats the drawn images, but for the order of equal scores within one image and class.

Shape legend: B resamples, I images, K classes, T IoU thresholds, D detections of a class, P true positives among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from pycocotools.cocoeval import COCOeval

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
_VALUES_AT_ONCE = 2**22  # weights held at a time: 1,000 resamples of a class with 4,000 detections


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassMatches:
    """What COCO's AP of one class is computed from.

    Attributes:
        images: (D,) position of each detection's image, detections by falling score.
        is_true: (T, D) whether it matches an object that counts.
        is_ignored: (T, D) whether it counts neither as true nor as false, as on a crowd region.
        num_objects: (I,) objects of each image that count.
    """

    images: np.ndarray
    is_true: np.ndarray
    is_ignored: np.ndarray
    num_objects: np.ndarray


def class_matches(evaluator: COCOeval) -> list[ClassMatches]:
    """The matches of each class, in the order of ``params.catIds``, of objects of every size.

    Args:
        evaluator: after ``evaluate``; images in the order of ``params.imgIds``.
    """
    num_images, num_areas = len(evaluator.params.imgIds), len(evaluator.params.areaRng)
    firsts = range(0, len(evaluator.params.catIds) * num_areas * num_images, num_areas * num_images)
    return [_matches(evaluator.evalImgs[first : first + num_images], len(evaluator.params.iouThrs)) for first in firsts]


def _matches(by_image: Sequence[dict | None], num_thresholds: int) -> ClassMatches:
    found = [(position, entry) for position, entry in enumerate(by_image) if entry is not None]
    num_objects = np.zeros(len(by_image), np.int32)
    for position, entry in found:
        num_objects[position] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
    nothing = np.zeros((num_thresholds, 0), bool)
    scores = np.concatenate([np.zeros(0), *(entry["dtScores"] for _, entry in found)])
    order = np.argsort(-scores, kind="mergesort")  # COCOeval's
    ignored = np.concatenate([nothing, *(entry["dtIgnore"] for _, entry in found)], axis=1)[:, order] != 0
    matched = np.concatenate([nothing, *(entry["dtMatches"] for _, entry in found)], axis=1)[:, order] != 0
    images = np.repeat([position for position, _ in found], [len(entry["dtScores"]) for _, entry in found])
    return ClassMatches(
        images=images[order].astype(np.int32),
        is_true=matched & ~ignored,
        is_ignored=ignored,
        num_objects=num_objects,
    )


def resampled_average_precision(
    matches: Sequence[ClassMatches], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """AP of each class on resampled images, (B, K) in percent; NaN where a resample has no object of the class.

    Equal ``num_resamples`` and ``seed`` draw the same images, which is what makes two of these comparable, row by row.
    """
    num_images = len(matches[0].num_objects)
    random = np.random.default_rng(seed)
    weights = random.multinomial(num_images, np.full(num_images, 1 / num_images), size=num_resamples).astype(np.int32)
    return np.stack([weighted_average_precision(of_class, weights) for of_class in matches], axis=1)


def weighted_average_precision(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    """AP of one class with each image as often as its weight says: (B, I) int → (B,) percent."""
    num_objects = weights @ matches.num_objects
    chunk = max(1, _VALUES_AT_ONCE // max(1, len(matches.images)))
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 objects, replaced below
        parts = [
            _chunk_average_precision(matches, weights[start : start + chunk], num_objects[start : start + chunk])
            for start in range(0, len(weights), chunk)
        ]
    return np.where(num_objects > 0, 100 * np.concatenate(parts), np.nan)


def _chunk_average_precision(matches: ClassMatches, weights: np.ndarray, num_objects: np.ndarray) -> np.ndarray:
    recalls = np.linspace(0, 1, 101)  # COCOeval's recThrs
    of_detections = weights[:, matches.images]  # (B, D)
    all_seen = np.cumsum(of_detections, axis=1, dtype=np.int32)
    total = np.zeros(len(weights))
    for is_true, is_ignored in zip(matches.is_true, matches.is_ignored, strict=True):
        columns = np.flatnonzero(is_true)
        if not columns.size:
            continue
        seen = all_seen[:, columns]
        if is_ignored.any():
            passed = np.cumsum(of_detections[:, is_ignored], axis=1, dtype=np.int32)
            before = np.searchsorted(np.flatnonzero(is_ignored), columns)
            seen = seen - np.pad(passed, ((0, 0), (1, 0)))[:, before]
        hits = np.cumsum(of_detections[:, columns], axis=1, dtype=np.int32)  # (B, P)
        precision = hits / (seen + np.spacing(1))
        interpolated = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(recalls, hits / num_objects[:, None], side="right")  # recall points up to each
        total += (interpolated * np.diff(reached, axis=1, prepend=0)).sum(axis=1)
    return total / (len(matches.is_true) * len(recalls))


def paired_interval(candidate: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Where the difference of two resampled APs lies with 95 % confidence (percentile bootstrap), low and high.

    Args:
        candidate, reference: (B, K) of :func:`resampled_average_precision` with the same images and seed, or (B,) of
            one class. AP is the mean over the classes that a resample has objects of.
    """
    differences = _mean_of_classes(candidate) - _mean_of_classes(reference)
    differences = differences[~np.isnan(differences)]
    if not differences.size:
        return float("nan"), float("nan")
    low, high = np.quantile(differences, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def _mean_of_classes(resampled: np.ndarray) -> np.ndarray:
    if resampled.ndim == 1:
        return resampled
    exists = ~np.isnan(resampled)
    count = exists.sum(axis=1)
    return np.where(count > 0, np.where(exists, resampled, 0).sum(axis=1) / np.maximum(count, 1), np.nan)
