from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.average_precision import average_precision, compressed_mask
from export.signature import Detections

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_eval_golden"
CATEGORY_IDS = (3, 7)


def annotation(image_id: int, category_id: int, bbox: list[float]) -> dict[str, Any]:
    return {"id": image_id * 10 + category_id, "image_id": image_id, "category_id": category_id, "bbox": bbox}


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Three images, one of them without objects; boxes of 20, 50 and 120 pixels."""
    content = {
        "images": [{"id": i, "width": 200, "height": 200, "file_name": f"{i}.jpg"} for i in (1, 2, 3)],
        "annotations": [
            annotation(1, 3, [10, 10, 20, 20]),
            annotation(1, 7, [50, 50, 50, 50]),
            annotation(2, 3, [20, 20, 120, 120]),
        ],
        "categories": [{"id": i, "name": str(i)} for i in CATEGORY_IDS],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    return path


def detections(*rows: tuple[list[float], float, int]) -> Detections:
    return Detections(
        boxes=np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        scores=np.array([row[1] for row in rows], np.float32),
        labels=np.array([row[2] for row in rows], np.int32),
    )


PERFECT = {
    1: detections(([10, 10, 30, 30], 0.9, 0), ([50, 50, 100, 100], 0.8, 1)),
    2: detections(([20, 20, 140, 140], 0.7, 0)),
    3: detections(),
}


def test_perfect_detections_have_average_precision_100(truth: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = average_precision(truth, PERFECT, CATEGORY_IDS)
    assert result.scores == pytest.approx(dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"), 100.0))
    assert result.per_class == {"AP": pytest.approx({3: 100.0, 7: 100.0})}
    assert capfd.readouterr() == ("", "")


def test_a_confident_false_positive_on_an_image_without_objects_costs(truth: Path) -> None:
    noisy = {**PERFECT, 3: detections(([0, 0, 50, 50], 0.95, 0))}
    per_class = average_precision(truth, noisy, CATEGORY_IDS).per_class["AP"]
    # Precision of class 3 is 1/2 at its first object and 2/3 at its second, which interpolates to 2/3 throughout.
    assert per_class == pytest.approx({3: 200 / 3, 7: 100.0}, abs=1e-6)


def test_a_missed_object_a_wrong_label_and_a_loose_box_cost(truth: Path) -> None:
    missed = average_precision(truth, {1: PERFECT[1]}, CATEGORY_IDS).scores
    assert missed["APl"] == 0
    assert 0 < missed["AP"] < 100
    wrong = {**PERFECT, 1: detections(([10, 10, 30, 30], 0.9, 1), ([50, 50, 100, 100], 0.8, 1))}
    assert average_precision(truth, wrong, CATEGORY_IDS).scores["AP"] < 100
    loose = {**PERFECT, 2: detections(([20, 20, 140, 110], 0.7, 0))}  # IoU 0.75: right at 0.5, wrong above 0.75
    assert average_precision(truth, loose, CATEGORY_IDS).scores["APl"] == pytest.approx(60.0)
    assert average_precision(truth, loose, CATEGORY_IDS).scores["AP50"] == pytest.approx(100.0)


def test_without_any_detection_it_is_zero_and_without_ground_truth_not_a_number(truth: Path, tmp_path: Path) -> None:
    assert average_precision(truth, {}, CATEGORY_IDS).scores["AP"] == 0
    content = json.loads(truth.read_text())
    content["annotations"] = content["annotations"][2:]
    (tmp_path / "large.json").write_text(json.dumps(content))
    result = average_precision(tmp_path / "large.json", PERFECT, CATEGORY_IDS)
    assert math.isnan(result.scores["APs"])
    assert math.isnan(result.per_class["AP"][7])


def test_detections_of_an_image_that_is_not_in_the_file_are_an_error(truth: Path) -> None:
    with pytest.raises(ValueError, match="image id 99"):
        average_precision(truth, {99: PERFECT[1]}, CATEGORY_IDS)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the COCO API's own example results are not beside this checkout")
def test_it_equals_the_coco_apis_published_result_for_its_example() -> None:
    truth = GOLDEN / "instances_val2014_100.json"
    category_ids = sorted(category["id"] for category in json.loads(truth.read_text())["categories"])
    by_image: dict[int, list[dict[str, Any]]] = {}
    for result in json.loads((GOLDEN / "instances_val2014_fakebbox100_results.json").read_text()):
        by_image.setdefault(result["image_id"], []).append(result)
    found = {}
    for image_id, results in by_image.items():
        x, y, w, h = np.array([result["bbox"] for result in results]).T
        found[image_id] = Detections(  # float64: rounding the example's coordinates moves its AP by 0.05
            boxes=np.stack([x, y, x + w, y + h], axis=1),
            scores=np.array([result["score"] for result in results]),
            labels=np.array([category_ids.index(result["category_id"]) for result in results]),
        )
    evaluation = average_precision(truth, found, category_ids)
    ap = evaluation.scores
    assert [round(ap[name] / 100, 3) for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")] == [
        0.505, 0.697, 0.573, 0.586, 0.519, 0.501,
    ]  # fmt: skip
    assert np.nanmean(list(evaluation.per_class["AP"].values())) == pytest.approx(ap["AP"])


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the COCO API's own example results are not beside this checkout")
def test_mask_ap_equals_the_coco_apis_published_result_for_its_example() -> None:
    truth = GOLDEN / "instances_val2014_100.json"
    category_ids = sorted(category["id"] for category in json.loads(truth.read_text())["categories"])
    by_image: dict[int, list[dict[str, Any]]] = {}
    for result in json.loads((GOLDEN / "instances_val2014_fakesegm100_results.json").read_text()):
        by_image.setdefault(result["image_id"], []).append(result)
    found = {
        image_id: Detections(
            boxes=np.zeros((len(results), 4)),  # mask AP asks the masks alone
            scores=np.array([result["score"] for result in results]),
            labels=np.array([category_ids.index(result["category_id"]) for result in results]),
        )
        for image_id, results in by_image.items()
    }
    masks = {image_id: [result["segmentation"] for result in results] for image_id, results in by_image.items()}
    evaluation = average_precision(truth, found, category_ids, masks)
    assert evaluation.scores["segm_AP"] / 100 == pytest.approx(0.3195, abs=5e-4)
    of_classes = list(evaluation.per_class["segm_AP"].values())
    assert np.nanmean(of_classes) == pytest.approx(evaluation.scores["segm_AP"])


def test_mask_ap_judges_pixels_and_box_ap_boxes(truth: Path, tmp_path: Path) -> None:
    content = json.loads(truth.read_text())
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["segmentation"] = [[x, y, x + width, y, x, y + height]]
        entry["area"] = width * height / 2
    with_masks = tmp_path / "with_masks.json"
    with_masks.write_text(json.dumps(content))

    def drawn(fraction: float) -> dict[int, list[dict[str, Any]]]:
        rows, columns = np.mgrid[:200, :200] + 0.5
        return {
            image_id: [
                compressed_mask((columns >= x1) & (rows >= y1) & (columns - x1 + rows - y1 <= fraction * (x2 - x1)))
                for x1, y1, x2, y2 in found.boxes
            ]
            for image_id, found in PERFECT.items()
        }

    exact = average_precision(with_masks, PERFECT, CATEGORY_IDS, drawn(1.0)).scores
    assert exact["segm_AP50"] == exact["segm_AP75"] == exact["AP"] == pytest.approx(100)
    loose = average_precision(with_masks, PERFECT, CATEGORY_IDS, drawn(0.8)).scores  # IoU 0.64
    assert loose["AP"] == pytest.approx(100)
    assert loose["segm_AP50"] == pytest.approx(100)
    assert loose["segm_AP75"] == pytest.approx(0)
    assert "segm_AP" not in average_precision(with_masks, PERFECT, CATEGORY_IDS).scores
