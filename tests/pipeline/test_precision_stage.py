"""The precision stage: what it calibrates on, what it writes, and what its files may lose."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest
from PIL import Image
from rich.console import Console

from export import precision as conversion
from export.config import ExportConfig
from export.parity import ParityConfig
from export.precision import TooFewCalibrationImages
from export.signature import DetectorSignature
from pipeline import environment, precision_stage
from pipeline.artifact import Artifact, Manifest, files_in
from pipeline.model_files import ONNX_RUNTIME, typed_onnx
from pipeline.precision_rungs import add_precision_rungs, floor_of, precision_head_differences
from pipeline.precision_stage import LAYERS_FILE, precision
from pipeline.recipe import Recipe
from pipeline.stage import StageContext, StageResult
from tests.export.conftest import Exported
from tests.export.conftest import exported as exported  # the fixture

STAND_IN = Path(__file__).parents[1] / "stand_in"
NUM_TRAIN = 9


def artifact(directory: Path, facts: dict[str, Any]) -> Artifact:
    texts = dict.fromkeys(("stage", "fingerprint", "command", "started", "finished"), "")
    empty: dict[str, Any] = {key: {} for key in ("inputs", "config", "environment", "machine")}
    manifest = Manifest(
        **texts, **empty, stage_version=1, files=files_in(directory), facts=facts, gates=[], seconds=0.0
    )
    return Artifact(directory=directory, manifest=manifest)


@pytest.fixture
def inputs(exported: Exported, tmp_path: Path) -> dict[str, Artifact]:
    """A training set whose image k has the grey value 10 k, and the tiny exported detector; no validation set."""
    data, export = tmp_path / "data", tmp_path / "export"
    (data / "images").mkdir(parents=True)
    export.mkdir()
    for number in range(NUM_TRAIN):
        Image.fromarray(np.full((192, 320, 3), 10 * number, np.uint8)).save(data / "images" / f"{number}.png")
    names = [f"{number}.png" for number in range(NUM_TRAIN)]
    content = {
        "images": [{"id": i, "file_name": name, "height": 192, "width": 320} for i, name in enumerate(names)],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}],
        "categories": [{"id": i, "name": n} for i, n in zip(exported.signature.category_ids, "abcde", strict=True)],
    }
    (data / "train.json").write_text(json.dumps(content))
    (export / "model.onnx").write_bytes(exported.path.read_bytes())
    exported.signature.write(export)
    facts = {"train": {"annotation_file": "train.json", "image_dir": "images"}}
    return {"data": artifact(data, facts), "export": artifact(export, {})}


def run(inputs: dict[str, Artifact], directory: Path, **export: Any) -> StageResult:
    directory.mkdir()
    edges = {"canvas": (192, 320), "short_edge_pixels": 192, "max_edge_pixels": 320}
    recipe = Recipe(name="r", path=Path("r.py"), resolved={}, sections={"export": ExportConfig(**edges, **export)})
    return precision(
        StageContext(
            directory=directory, run_dir=directory.parent, recipe=recipe, inputs=inputs, console=Console(), command=""
        )
    )


def test_float32_is_said_to_need_nothing_and_is_not_copied(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    result = run(inputs, tmp_path / "out", precision="tf32")
    assert (result.facts["precision"], result.facts["converted"]) == ("tf32", False)
    assert "nothing to convert" in result.facts["reason"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LAYERS_FILE]
    layers = json.loads((tmp_path / "out" / LAYERS_FILE).read_text())["model.onnx"]
    assert {layer["type"] for layer in layers} == {"FLOAT"}
    stages = {**inputs, "precision": artifact(tmp_path / "out", dict(result.facts))}
    assert typed_onnx(stages) == inputs["export"].path("model.onnx")


def test_int8_is_calibrated_on_training_images_spread_over_the_set_and_written_twice(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "MODELOPT", STAND_IN)
    seen = []
    write = precision_stage.write_typed_onnx
    monkeypatch.setattr(
        precision_stage, "write_typed_onnx", lambda *arguments: seen.append(arguments[3]) or write(*arguments)
    )
    result = run(inputs, tmp_path / "out", precision="int8", num_calibration_images=3)
    assert [int(image[0, 0, 0]) for image in seen[0]] == [0, 40, 80], "the first, the middle and the last"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [LAYERS_FILE, "model.onnx", "model_cpu.onnx", "signature.json"]
    for name in ("model.onnx", "model_cpu.onnx"):
        facts = result.facts["files"][name]
        assert facts["layers_by_type"]["INT8"] > facts["layers_by_type"]["FLOAT"]
        assert facts["num_calibration_images"] == 3
        layers = json.loads((tmp_path / "out" / LAYERS_FILE).read_text())[name]
        assert {layer["exempt"] for layer in layers if layer["type"] == "FLOAT"} == {"first layers", "last layers"}
    assert len(result.gates) == 4
    stages = {**inputs, "precision": artifact(tmp_path / "out", dict(result.facts))}
    assert {n.op_type for n in onnx.load(typed_onnx(stages)).graph.node} >= {"QuantizeLinear", "DequantizeLinear"}


def test_a_training_set_smaller_than_asked_for_is_refused_before_anything_is_written(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    with pytest.raises(TooFewCalibrationImages, match=r"on 512 training images and the training set has 9"):
        run(inputs, tmp_path / "out", precision="int8")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("precision", "ap", "passes"),
    [
        ("fp16", 49.91, True),
        ("fp16", 49.89, False),
        ("bf16", 49.89, False),
        ("int8", 49.51, True),
        ("int8", 49.49, False),
        ("fp8", 49.49, False),
    ],
)
def test_a_precision_may_lose_only_so_much(precision: str, ap: float, passes: bool) -> None:
    assert (50 - ap <= floor_of(precision, ParityConfig()).allowed_drop(50.0)) is passes


def test_what_onnx_runtime_has_no_kernels_for_is_not_run_and_the_engine_is_compared_with_the_exported_file(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "facts", lambda: {"gpus": []})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_bytes(b"bfloat16")
    stages = {**inputs, "precision": artifact(tmp_path / "out", {"precision": "bf16"})}
    context: Any = SimpleNamespace(inputs=stages, recipe=SimpleNamespace(sections={"parity": ParityConfig()}))
    ladder = MagicMock()
    assert add_precision_rungs(ladder, context, DetectorSignature.read(inputs["export"].directory)) == ONNX_RUNTIME
    (name, reason, _), _ = ladder.add_not_run.call_args
    assert (name, reason) == ("ONNX Runtime, bf16", "ONNX Runtime has no bfloat16 kernels on a CPU")
    assert not ladder.add.called
    assert precision_head_differences(context, []) == []
