"""How near the detections of two rungs are: who has a partner, how far partners lie apart, and which images changed.

Looser than :mod:`export.parity`, which asks whether two runners are the same: here a partner is a detection of the same
class on the same object, however far its score has moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from export.average_precision import Segmentations
from export.parity import pairwise_iou
from export.signature import Detections

MIN_PARTNER_IOU = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How two rungs agree over a data set, counting detections whose score, or whose partner's, is above the floor.

    Attributes:
        score_floor: what counts.
        num_detections: of both rungs.
        num_matched: those with a partner.
        matched_rate: their share; None without detections.
        iou_p01, iou_p50: quantiles of the IoU of partners; None without pairs, as are the others.
        score_error_p50, score_error_p99, score_error_max: of the absolute difference of their scores.
        mask_iou_p01, mask_iou_p50: of the IoU of their masks in the image; None without masks.
    """

    score_floor: float
    num_detections: int
    num_matched: int
    matched_rate: float | None
    iou_p01: float | None
    iou_p50: float | None
    score_error_p50: float | None
    score_error_p99: float | None
    score_error_max: float | None
    mask_iou_p01: float | None
    mask_iou_p50: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageAgreement:
    """The same of one image.

    Attributes:
        num_detections: of both rungs, above the floor.
        ious, score_errors, mask_ious: of each pair; ``mask_ious`` is empty without masks.
        change: how much of what was found changed: 1 - IoU (of boxes or masks, the lower) times the higher score plus
            the difference of the scores, summed over the pairs, plus the scores of those without a partner.
    """

    num_detections: int
    ious: np.ndarray
    score_errors: np.ndarray
    mask_ious: np.ndarray
    change: float


def agreement_by_image(
    reference: Mapping[int, Detections],
    candidate: Mapping[int, Detections],
    *,
    score_floor: float,
    reference_masks: Segmentations | None = None,
    candidate_masks: Segmentations | None = None,
) -> dict[int, ImageAgreement]:
    """Compare image by image; an image that is missing on one side has no detections there.

    Args:
        reference, candidate: by image id, boxes in original image pixels.
        reference_masks, candidate_masks: of each image, the masks of its detections, in their order.
    """
    nothing = Detections(boxes=np.zeros((0, 4)), scores=np.zeros(0), labels=np.zeros(0, np.int32))
    return {
        image_id: _agreement(
            reference.get(image_id, nothing),
            candidate.get(image_id, nothing),
            (reference_masks or {}).get(image_id),
            (candidate_masks or {}).get(image_id),
            score_floor,
        )
        for image_id in sorted(reference.keys() | candidate.keys())
    }


def partners(reference: Detections, candidate: Detections) -> list[tuple[int, int]]:
    """Pairs of detections of one class with an IoU of 0.5 or more, each in at most one pair.

    By falling score of the reference, each takes the nearest box that is left, and of equal ones the nearest score.
    """
    iou = pairwise_iou(reference.boxes, candidate.boxes)
    score_error = np.abs(reference.scores[:, None] - candidate.scores[None, :])
    possible = (reference.labels[:, None] == candidate.labels[None, :]) & (iou >= MIN_PARTNER_IOU)
    free = np.ones(len(candidate), dtype=bool)
    pairs = []
    for i in np.argsort(-reference.scores, kind="stable").tolist():
        choices = np.flatnonzero(possible[i] & free)
        if choices.size:
            j = int(choices[np.lexsort((score_error[i, choices], -iou[i, choices]))[0]])
            free[j] = False
            pairs.append((i, j))
    return pairs


def _agreement(
    before: Detections,
    after: Detections,
    before_masks: Sequence[dict[str, Any]] | None,
    after_masks: Sequence[dict[str, Any]] | None,
    score_floor: float,
) -> ImageAgreement:
    pairs = [(i, j) for i, j in partners(before, after) if max(before.scores[i], after.scores[j]) > score_floor]
    i, j = np.array(pairs, dtype=int).reshape(-1, 2).T
    ious = np.diagonal(pairwise_iou(before.boxes[i], after.boxes[j]))
    score_errors = np.abs(before.scores[i].astype(np.float64) - after.scores[j])
    lonely = np.concatenate([np.delete(before.scores, i), np.delete(after.scores, j)])
    lonely = lonely[lonely > score_floor]
    mask_ious = _mask_ious(before_masks, after_masks, pairs)
    overlap = np.minimum(ious, mask_ious) if mask_ious.size else ious
    moved = (1 - overlap) * np.maximum(before.scores[i], after.scores[j])
    return ImageAgreement(
        num_detections=2 * len(pairs) + len(lonely),
        ious=ious,
        score_errors=score_errors,
        mask_ious=mask_ious,
        change=float(moved.sum() + score_errors.sum() + lonely.sum()),
    )


def _mask_ious(
    before: Sequence[dict[str, Any]] | None, after: Sequence[dict[str, Any]] | None, pairs: Sequence[tuple[int, int]]
) -> np.ndarray:
    if before is None or after is None:
        return np.zeros(0)
    return np.array([_mask_iou(before[i], after[j]) for i, j in pairs])


def _mask_iou(a: dict[str, Any], b: dict[str, Any]) -> float:
    """IoU of two masks; 1 where both are empty, as they are equal."""
    if coco_mask.area(a) == coco_mask.area(b) == 0:
        return 1.0
    return float(coco_mask.iou([b], [a], [0])[0, 0])


def agreement(images: Iterable[ImageAgreement], *, score_floor: float) -> Agreement:
    """One verdict over many images."""
    images = list(images)
    num_detections = sum(image.num_detections for image in images)
    num_matched = sum(2 * len(image.ious) for image in images)
    ious, score_errors, mask_ious = (
        np.concatenate([np.zeros(0), *(getattr(image, name) for image in images)])
        for name in ("ious", "score_errors", "mask_ious")
    )
    return Agreement(
        score_floor=score_floor,
        num_detections=num_detections,
        num_matched=num_matched,
        matched_rate=num_matched / num_detections if num_detections else None,
        iou_p01=_quantile(ious, 0.01),
        iou_p50=_quantile(ious, 0.5),
        score_error_p50=_quantile(score_errors, 0.5),
        score_error_p99=_quantile(score_errors, 0.99),
        score_error_max=_quantile(score_errors, 1.0),
        mask_iou_p01=_quantile(mask_ious, 0.01),
        mask_iou_p50=_quantile(mask_ious, 0.5),
    )


def _quantile(values: np.ndarray, share: float) -> float | None:
    return float(np.quantile(values, share)) if values.size else None
