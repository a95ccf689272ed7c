"""A tiny Mask R-CNN from sprites with masks to a live endpoint that draws them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pycocotools import mask as coco_mask

from pipeline.__main__ import main

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "tests" / "pipeline" / "tiny_mask_recipe.py"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["pipeline", "run", str(RECIPE), "--until", "deploy", "--runs", str(runs)])
        with pytest.raises(SystemExit) as ending:
            main()
    assert not ending.value.code
    return runs / RECIPE.stem


def facts(run_dir: Path, stage: str) -> dict:
    return json.loads((run_dir / stage / "manifest.json").read_text())["facts"]


def test_masks_agree_from_detectron2_to_the_endpoint(run_dir: Path) -> None:
    matching = facts(run_dir, "validate")["matching"]
    assert matching["num_matched"] > 100
    assert matching["num_unmatched"] == 0
    assert 0 < matching["max_mask_error"] < 1e-4
    golden = facts(run_dir, "deploy")["golden_images"]
    assert golden["num"] > 0
    assert golden["num_unmatched"] == 0


def test_every_row_has_the_ap_of_boxes_and_of_masks(run_dir: Path) -> None:
    rows = facts(run_dir, "validate")["rows"] + facts(run_dir, "deploy")["rows"]
    measured = [row for row in rows if row["status"] == "passed"]
    assert len(measured) >= 6
    assert all({"AP", "segm_AP", "segm_AP50"} <= set(row) for row in measured)
    for row in measured[1:]:
        assert f"mask AP of {row['name']} minus that of {row['compared_with']}, at least" in row["gates"]
        assert row["differences"]["segm_AP"]["low"] <= row["differences"]["segm_AP"]["high"]
    for row in measured[2:]:
        assert row["agreement"]["mask_iou_p01"] > 0.99


def test_the_detections_that_are_kept_hold_masks_of_their_images_sizes(run_dir: Path) -> None:
    document = json.loads((run_dir / "data" / "instances_validation.json").read_text())
    sizes = {image["id"]: [image["height"], image["width"]] for image in document["images"]}
    results = json.loads((run_dir / "validate" / "detections_onnx_runtime.json").read_text())
    assert results
    assert all(result["segmentation"]["size"] == sizes[result["image_id"]] for result in results)
    areas = [coco_mask.area(result["segmentation"]) for result in results]
    boxes = [result["bbox"][2] * result["bbox"][3] for result in results]
    assert sum(areas) > 0
    assert all(area <= box + 2 * (result["bbox"][2] + result["bbox"][3]) + 4 for area, box, result in
               zip(areas, boxes, results, strict=True)), "a mask lies in its box"  # fmt: skip


def test_the_engine_names_the_architecture_that_it_could_not_be_built_for(run_dir: Path) -> None:
    built = facts(run_dir, "engine")
    if built["status"] == "built" and built["library"] == "tensorrt_rtx":
        assert built["compute_capabilities"] == ["89"]
        assert "Turing" in built["excluded"]["75"]


def test_nothing_of_the_teacher_ships(run_dir: Path) -> None:
    proof = facts(run_dir, "strip")
    assert proof["keys_are_stock"]
    assert proof["max_abs_difference"] == 0.0
    assert facts(run_dir, "export")["num_teacher_initializers"] == 0
