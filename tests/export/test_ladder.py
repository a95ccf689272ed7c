from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from export.ladder import MIN_CHANGE, Floor, Measured, compared, measured
from export.signature import Detections

CATEGORY_IDS = (3, 7)
NUM_IMAGES = 40


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Two objects an image, one of each class, at places of their own."""
    annotations = [
        {
            "id": 2 * image_id + k,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": [10 + image_id, 10 + 80 * k, 40, 40],
            "area": 1600,
            "iscrowd": 0,
        }
        for image_id in range(1, NUM_IMAGES + 1)
        for k, category_id in enumerate(CATEGORY_IDS)
    ]
    content = {
        "images": [{"id": i, "width": 200, "height": 200, "file_name": f"{i}.png"} for i in range(1, NUM_IMAGES + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in CATEGORY_IDS],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    return path


def found(shift_of_class_7: float = 0.0, score: float = 0.9) -> dict[int, Detections]:
    """Both objects of every image, those of the second class moved by so many pixels a further image."""
    return {
        image_id: Detections(
            boxes=np.array(
                [
                    [10 + image_id, 10, 50 + image_id, 50],
                    [10 + image_id + shift_of_class_7 * image_id / NUM_IMAGES, 90, 50 + image_id, 130],
                ],
                np.float32,
            ),
            scores=np.array([score, score - 0.1], np.float32),
            labels=np.array([0, 1], np.int32),
        )
        for image_id in range(1, NUM_IMAGES + 1)
    }


@pytest.fixture
def exact(truth: Path) -> Measured:
    return measured(truth, found(), CATEGORY_IDS)


def test_a_rung_that_finds_the_same_differs_by_nothing(truth: Path, exact: Measured) -> None:
    result = compared(measured(truth, found(), CATEGORY_IDS), exact, score_floor=0.3)
    assert set(result.differences) == {"AP"}
    difference = result.differences["AP"]
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert result.agreement.matched_rate == 1.0
    assert result.worst_classes == []
    assert result.changed_images == []


def test_the_class_that_lost_and_the_images_that_changed_are_named_the_most_first(truth: Path, exact: Measured) -> None:
    result = compared(measured(truth, found(shift_of_class_7=16.0), CATEGORY_IDS), exact, score_floor=0.3)
    (worst,) = result.worst_classes
    assert worst.category_id == 7
    assert worst.difference.value == pytest.approx(worst.AP - 100)
    assert worst.difference.value == pytest.approx(2 * result.differences["AP"].value)
    assert worst.difference.low < worst.difference.value < worst.difference.high < 0
    assert result.differences["AP"].low < result.differences["AP"].value < result.differences["AP"].high < 0
    changes = [image.change for image in result.changed_images]
    assert [image.image_id for image in result.changed_images] == list(range(40, 28, -1))
    assert changes == sorted(changes, reverse=True)
    assert changes[0] == pytest.approx(0.8 * 16 / 40)


def test_rounding_is_no_change(truth: Path, exact: Measured) -> None:
    result = compared(measured(truth, found(score=0.9 + MIN_CHANGE / 3), CATEGORY_IDS), exact, score_floor=0.3)
    assert result.agreement.score_error_max == pytest.approx(MIN_CHANGE / 3, rel=1e-4)
    assert result.changed_images == []


def test_a_floor_is_in_points_or_a_share_and_the_larger_drop_is_allowed() -> None:
    assert Floor(points=0.05).allowed_drop(40.0) == 0.05
    assert Floor(share=0.01).allowed_drop(40.0) == pytest.approx(0.4)
    assert Floor(points=0.5, share=0.01).allowed_drop(40.0) == 0.5
