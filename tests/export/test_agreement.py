from __future__ import annotations

import numpy as np
import pytest

from export.agreement import agreement, agreement_by_image, partners
from export.average_precision import compressed_mask
from export.parity import pairwise_iou
from export.signature import Detections


def detections(*rows: tuple[list[float], float, int]) -> Detections:
    return Detections(
        boxes=np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        scores=np.array([row[1] for row in rows], np.float32),
        labels=np.array([row[2] for row in rows], np.int32),
    )


def random_image(random: np.random.Generator) -> tuple[Detections, Detections]:
    """Detections of two rungs: most moved a little, some gone, some new."""
    count = int(random.integers(0, 12))
    corners = random.uniform(0, 200, (count, 2))
    boxes = np.concatenate([corners, corners + random.uniform(20, 60, (count, 2))], axis=1)
    scores, labels = np.sort(random.random(count))[::-1], random.integers(0, 3, count)
    before = Detections(boxes=boxes.astype(np.float32), scores=scores.astype(np.float32), labels=labels)
    keep = random.random(count) < 0.8
    moved = boxes + random.normal(0, 3, boxes.shape)
    drifted = (scores + random.normal(0, 0.05, count)).clip(0, 1)
    return before, Detections(boxes=moved.astype(np.float32), scores=drifted.astype(np.float32), labels=labels).where(
        keep
    )


def looped(
    images: dict[int, tuple[Detections, Detections]], floor: float
) -> tuple[int, list[float], list[float], dict]:
    """Detections that count, IoUs and score errors of the pairs, and each image's change, one detection at a time."""
    total, ious, errors, changes = 0, [], [], {}
    for image_id, (before, after) in images.items():
        taken: set[int] = set()
        change = 0.0
        for i in sorted(range(len(before)), key=lambda i: -before.scores[i]):
            best, best_iou = None, 0.5
            for j in range(len(after)):
                iou = float(pairwise_iou(before.boxes[i : i + 1], after.boxes[j : j + 1])[0, 0])
                if j not in taken and before.labels[i] == after.labels[j] and iou >= best_iou:
                    best, best_iou = j, iou
            if best is None:
                if before.scores[i] > floor:
                    total, change = total + 1, change + float(before.scores[i])
                continue
            taken.add(best)
            higher = max(float(before.scores[i]), float(after.scores[best]))
            if higher > floor:
                error = abs(float(before.scores[i]) - float(after.scores[best]))
                total, change = total + 2, change + (1 - best_iou) * higher + error
                ious.append(best_iou)
                errors.append(error)
        for j in range(len(after)):
            if j not in taken and after.scores[j] > floor:
                total, change = total + 1, change + float(after.scores[j])
        changes[image_id] = change
    return total, ious, errors, changes


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_rates_quantiles_and_changes_are_those_of_loops(floor: float) -> None:
    random = np.random.default_rng(0)
    images = {image_id: random_image(random) for image_id in range(30)}
    by_image = agreement_by_image(
        {i: before for i, (before, _) in images.items()},
        {i: after for i, (_, after) in images.items()},
        score_floor=floor,
    )
    result = agreement(by_image.values(), score_floor=floor)
    total, ious, errors, changes = looped(images, floor)
    assert len(ious) > 40
    assert result.num_detections == total
    assert result.num_matched == 2 * len(ious)
    assert result.matched_rate == pytest.approx(2 * len(ious) / total)
    ordered = sorted(ious), sorted(errors)

    def quantile(values: list[float], share: float) -> float:
        position = share * (len(values) - 1)
        low = int(position)
        high = min(low + 1, len(values) - 1)
        return values[low] + (position - low) * (values[high] - values[low])

    assert result.iou_p01 == pytest.approx(quantile(ordered[0], 0.01))
    assert result.iou_p50 == pytest.approx(quantile(ordered[0], 0.5))
    assert result.score_error_p50 == pytest.approx(quantile(ordered[1], 0.5))
    assert result.score_error_p99 == pytest.approx(quantile(ordered[1], 0.99))
    assert result.score_error_max == pytest.approx(max(errors))
    assert {i: image.change for i, image in by_image.items()} == pytest.approx(changes)


def test_a_partner_below_the_floor_still_is_one() -> None:
    box: list[float] = [0, 0, 40, 40]
    by_image = agreement_by_image({1: detections((box, 0.31, 0))}, {1: detections((box, 0.29, 0))}, score_floor=0.3)
    result = agreement(by_image.values(), score_floor=0.3)
    assert (result.num_detections, result.num_matched, result.matched_rate) == (2, 2, 1.0)
    assert result.score_error_max == pytest.approx(0.02)
    assert result.mask_iou_p50 is None


def test_an_image_that_one_rung_found_nothing_on_counts_whole() -> None:
    found = {7: detections(([0, 0, 40, 40], 0.9, 0), ([50, 50, 90, 90], 0.2, 0))}
    for reference, candidate in ((found, {}), ({}, found)):
        by_image = agreement_by_image(reference, candidate, score_floor=0.3)
        assert by_image[7].change == pytest.approx(0.9)
        assert agreement(by_image.values(), score_floor=0.3).matched_rate == 0
    assert agreement([], score_floor=0.3).matched_rate is None


def test_the_nearest_box_is_the_partner_and_of_equal_ones_the_nearest_score() -> None:
    before = detections(([0, 0, 40, 40], 0.9, 0))
    assert partners(before, detections(([0, 0, 40, 30], 0.9, 0), ([0, 0, 40, 38], 0.5, 0))) == [(0, 1)]
    assert partners(before, detections(([0, 0, 40, 40], 0.2, 0), ([0, 0, 40, 40], 0.8, 0))) == [(0, 1)]
    assert partners(before, detections(([0, 0, 40, 40], 0.9, 1))) == []
    assert partners(before, detections(([0, 25, 40, 65], 0.9, 0))) == []


def test_masks_are_compared_in_the_image_and_a_lost_mask_is_a_change() -> None:
    def masks(columns: int) -> list[dict]:
        drawn = np.zeros((60, 60), bool)
        drawn[0:40, 0:columns] = True
        return [compressed_mask(drawn)]

    found = {1: detections(([0, 0, 40, 40], 0.8, 0))}
    by_image = agreement_by_image(
        found, found, score_floor=0.3, reference_masks={1: masks(40)}, candidate_masks={1: masks(30)}
    )
    assert agreement(by_image.values(), score_floor=0.3).mask_iou_p01 == pytest.approx(0.75)
    assert by_image[1].change == pytest.approx(0.25 * 0.8)
    for columns, expected in ((0, 1.0), (40, 0.0)):
        by_image = agreement_by_image(
            found, found, score_floor=0.3, reference_masks={1: masks(0)}, candidate_masks={1: masks(columns)}
        )
        assert by_image[1].mask_ious.tolist() == [expected], "two empty masks are equal"
