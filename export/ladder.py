"""The ladder from eager PyTorch to the served answer: its rungs as data, and what each loses against the one before.

A rung is one way to run the detector on the validation images. It is compared with the rung that it was made from, so
a drop belongs to the step between the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from export.agreement import Agreement, agreement, agreement_by_image
from export.average_precision import Segmentations, average_precision
from export.average_precision_interval import paired_interval, resampled_average_precision
from export.signature import Detections

NUM_WORST_CLASSES = 3
MIN_CLASS_DROP = 0.05  # AP points; less is rounding
NUM_CHANGED_IMAGES = 12
MIN_CHANGE = 0.05
"""Of an image: less is rounding, not something to look at. A box of score 0.9 that moves to IoU 0.94 is as much."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """How far below another AP an AP may lie; it may always lie above.

    Attributes:
        points: AP points.
        share: of the other AP; 0.01 asks for 99 % of it. With both, the larger drop is allowed.
    """

    points: float = 0.0
    share: float = 0.0

    def allowed_drop(self, average_precision: float) -> float:
        """The largest drop below ``average_precision``, in AP points."""
        return max(self.points, self.share * average_precision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """One way to run the detector.

    Attributes:
        name: in tables; no two rungs share one.
        compared_with: the rung it was made from; None: the first.
        floors: of the AP of each rung named here, what this rung may lose; boxes and masks alike.
    """

    name: str
    compared_with: str | None = None
    floors: Mapping[str, Floor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What a rung found on the validation images.

    Attributes:
        found: by image id, boxes in original image pixels.
        masks: of each image, the masks of its detections, in their order; None for a detector of boxes alone.
        scores: COCO's metrics in percent (:class:`export.average_precision.Evaluation`).
        per_class: ``AP``, and with masks ``segm_AP``, of each category id.
        resampled: the same on resampled images, (resamples, classes); classes by category id.
    """

    found: Mapping[int, Detections]
    masks: Segmentations | None
    scores: Mapping[str, float]
    per_class: Mapping[str, Mapping[int, float]]
    resampled: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """AP minus that of the rung before, in points, and where it lies with 95 % confidence (paired bootstrap)."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassDifference:
    """AP of a class, and its difference to the rung before."""

    category_id: int
    AP: float
    difference: Difference


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChangedImage:
    """An image and how much of what was found on it changed (:class:`export.agreement.ImageAgreement`)."""

    image_id: int
    change: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A rung beside the one before.

    Attributes:
        differences: of ``AP``, and with masks of ``segm_AP``.
        agreement: of the detections.
        worst_classes: those that lost box AP by more than rounding, the largest loss first.
        changed_images: those that changed by more than rounding, the most changed first.
    """

    differences: Mapping[str, Difference]
    agreement: Agreement
    worst_classes: Sequence[ClassDifference]
    changed_images: Sequence[ChangedImage]


def measured(
    annotation_file: Path,
    found: Mapping[int, Detections],
    category_ids: Sequence[int],
    masks: Segmentations | None = None,
) -> Measured:
    """Evaluate a rung, once on the data set and on resampled images."""
    evaluation = average_precision(annotation_file, found, category_ids, masks)
    return Measured(
        found=found,
        masks=masks,
        scores=evaluation.scores,
        per_class=evaluation.per_class,
        resampled={name: resampled_average_precision(matches) for name, matches in evaluation.matches.items()},
    )


def compared(candidate: Measured, reference: Measured, *, score_floor: float) -> Comparison:
    """Hold a rung against another on the same images.

    Args:
        score_floor: detections with this score or less, and partners too, do not count as agreement or change.
    """
    by_image = agreement_by_image(
        reference.found,
        candidate.found,
        score_floor=score_floor,
        reference_masks=reference.masks,
        candidate_masks=candidate.masks,
    )
    changed = sorted(by_image, key=lambda image_id: -by_image[image_id].change)[:NUM_CHANGED_IMAGES]
    return Comparison(
        differences={
            name: _difference(candidate.scores[name] - reference.scores[name], resampled, reference.resampled[name])
            for name, resampled in candidate.resampled.items()
        },
        agreement=agreement(by_image.values(), score_floor=score_floor),
        worst_classes=_worst_classes(candidate, reference),
        changed_images=[
            ChangedImage(image_id=image_id, change=by_image[image_id].change)
            for image_id in changed
            if by_image[image_id].change >= MIN_CHANGE
        ],
    )


def _difference(value: float, candidate: np.ndarray, reference: np.ndarray) -> Difference:
    low, high = paired_interval(candidate, reference)
    return Difference(value=value, low=low, high=high)


def _worst_classes(candidate: Measured, reference: Measured) -> list[ClassDifference]:
    before, after = reference.per_class["AP"], candidate.per_class["AP"]
    columns = {category_id: column for column, category_id in enumerate(after)}
    lost = sorted((after[key] - before[key], key) for key in after if after[key] <= before[key] - MIN_CLASS_DROP)
    return [
        ClassDifference(
            category_id=key,
            AP=after[key],
            difference=_difference(
                value, candidate.resampled["AP"][:, columns[key]], reference.resampled["AP"][:, columns[key]]
            ),
        )
        for value, key in lost[:NUM_WORST_CLASSES]
    ]
