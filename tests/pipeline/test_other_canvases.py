"""Several canvases of one checkpoint through the real export and validate stages."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_bottom_up
from PIL import Image
from rich.console import Console

from export.runners import OnnxRuntimeRunner
from export.signature import DetectorSignature
from pipeline import recipe as recipes
from pipeline.export_stages import export, validate
from pipeline.precision_stage import precision
from pipeline.recipe_parts import retinanet
from pipeline.run import run_stages
from pipeline.stage import Stage, StageContext, StageResult
from pipeline.training_stages import REMOVED_TENSORS_FILE, STUDENT_CHECKPOINT
from tests.pipeline.small_run import small_data
from training.student import build_student

TINY = Path(__file__).with_name("tiny_recipe.py")
CLASS_NAMES, CATEGORY_IDS = ("dark", "dim", "bright"), (1, 5, 9)


def data(context: StageContext) -> StageResult:
    """Noise, because all locations of a flat image tie and none is the right one to take first."""
    found = small_data(context)
    for number, path in enumerate(sorted((context.directory / "images").iterdir())):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    return StageResult(facts={**found.facts, "class_names": CLASS_NAMES, "category_ids": CATEGORY_IDS})


def strip(context: StageContext) -> StageResult:
    student = build_student(context.recipe.model, len(CLASS_NAMES), seed=0)
    torch.save({"model": student.state_dict()}, context.directory / STUDENT_CHECKPOINT)
    (context.directory / REMOVED_TENSORS_FILE).write_text("[]")
    return StageResult()


def engine(context: StageContext) -> StageResult:
    return StageResult(facts={"status": "not run", "reason": "not asked for"})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "canvases"
    inputs = {
        "data": (),
        "strip": ("data",),
        "export": ("data", "strip"),
        "precision": ("data", "export"),
        "engine": ("export",),
    }
    stages = [
        Stage(
            name=function.__name__,
            version=1,
            inputs=inputs[function.__name__],
            config_sections=("export",),
            run=function,
        )
        for function in (data, strip, export, precision, engine)
    ]
    stages.append(Stage(name="validate", version=1, inputs=tuple(inputs), config_sections=("parity",), run=validate))
    canvases = ["export.canvas=[64,96]", "export.short_edge_pixels=64", "export.max_edge_pixels=96"]
    recipe = recipes.load(TINY, [*canvases, "export.canvases=[[64,64]]"])
    model = retinanet(tiny_bottom_up("res3", "res4", "res5"), channels=16, num_head_convs=1, smallest_anchor_pixels=16)
    model.test_score_thresh, model.test_topk_candidates = 0.005, 100  # random scores lie near 0.01
    recipe = dataclasses.replace(recipe, model=model)
    run_stages(tuple(stages), recipe, folder, console=Console(file=io.StringIO()))
    return folder


def facts_of(run_dir: Path, stage: str) -> dict[str, Any]:
    return json.loads((run_dir / stage / "manifest.json").read_text())


def test_each_canvas_has_a_model_and_a_signature_that_runs_it(run_dir: Path) -> None:
    main = DetectorSignature.read(run_dir / "export")
    folder = run_dir / "export" / "canvas_64x64"
    signature = DetectorSignature.read(folder)
    assert (main.image_shape, signature.image_shape) == ((3, 64, 96), (3, 64, 64))
    assert (signature.short_edge_pixels, signature.max_edge_pixels) == (64, 64)
    assert signature.outputs == main.outputs
    with OnnxRuntimeRunner(folder / "model.onnx", signature, num_threads=1) as runner:
        assert len(runner.run(np.zeros((3, *signature.image_shape), np.uint8))) == 3
    gates = {gate["name"]: gate["passed"] for gate in facts_of(run_dir, "export")["gates"]}
    assert gates["batch invariance, canvas 64 x 64: detections that change with the batch"] is True


def test_validate_has_a_row_of_each_canvas_with_what_it_costs_and_holds_it_to_detectron2(run_dir: Path) -> None:
    manifest = facts_of(run_dir, "validate")
    rows = {row["name"]: row for row in manifest["facts"]["rows"]}
    row = rows["canvas 64 x 64"]
    assert row["status"] == "passed"
    assert row["differences"]["AP"]["value"] == pytest.approx(row["AP"] - rows["detectron2"]["AP"])
    files = facts_of(run_dir, "export")["files"]
    assert row["digest"] == files["canvas_64x64/model.onnx"]["sha256"] != files["model.onnx"]["sha256"]
    (gate,) = [gate for gate in manifest["gates"] if "of canvas 64 x 64" in gate["name"]]
    assert gate["passed"]
    assert int(gate["reason"].split()[0]) > 100, "hardly anything was compared"
