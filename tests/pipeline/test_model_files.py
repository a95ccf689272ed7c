"""Each precision and each server gets the file that is made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import environment
from pipeline.artifact import Artifact, open_artifact
from pipeline.model_files import converted_files, served_file, serving_of, typed_onnx
from pipeline.recipe import Recipe
from pipeline.stage import StageContext
from serving.config import ServingConfig
from tests.pipeline.small_run import SmallRun

A_GPU = {**environment.facts(), "gpus": [{"name": "a GPU"}]}
NO_GPU = {**environment.facts(), "gpus": []}


@pytest.fixture
def inputs(tmp_path: Path) -> Any:
    """Artifacts of export, precision and engine, for a precision."""

    def of(precision: str) -> dict[str, Artifact]:
        run = SmallRun(tmp_path / precision)
        run.facts["precision"] = precision
        run.run(until="engine")
        return {name: open_artifact(run.run_dir / name) for name in ("export", "precision", "engine")}

    return of


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_float32_is_the_exports_own_file_for_everyone(inputs: Any, precision: str) -> None:
    artifacts = inputs(precision)
    assert typed_onnx(artifacts) == artifacts["export"].path("model.onnx")
    assert converted_files(artifacts) == []
    assert served_file(artifacts, ServingConfig(model_name="m")).path == artifacts["export"].path("model.onnx")


@pytest.mark.parametrize(("machine", "file"), [(NO_GPU, "model_cpu.onnx"), (A_GPU, "model.onnx")])
def test_int8_has_a_file_for_cpus_and_one_for_the_rest(
    inputs: Any, monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any], file: str
) -> None:
    monkeypatch.setattr(environment, "facts", lambda: machine)
    artifacts = inputs("int8")
    assert typed_onnx(artifacts) == artifacts["precision"].path("model.onnx"), "what the engine is built from"
    assert [made.path.name for made in converted_files(artifacts)] == ["model_cpu.onnx", "model.onnx"]
    assert served_file(artifacts, ServingConfig(model_name="m")).path == artifacts["precision"].path(file)
    engine = ServingConfig(model_name="m", server="container", backend="tensorrt")
    assert served_file(artifacts, engine).path == artifacts["engine"].path("model.plan")


def test_half_precision_is_one_file_for_everyone(inputs: Any) -> None:
    artifacts = inputs("fp16")
    (made,) = converted_files(artifacts)
    assert made.row == "ONNX Runtime, fp16"
    assert made.path == served_file(artifacts, ServingConfig(model_name="m")).path == typed_onnx(artifacts)


@pytest.mark.parametrize(
    ("named", "served"), [("d_r50_256_fp32", "d_r50_256_int8"), ("d_r50_256_fp16", "d_r50_256_int8"), ("mine", "mine")]
)
def test_a_model_name_that_ends_with_a_precision_ends_with_the_runs(inputs: Any, named: str, served: str) -> None:
    recipe = Recipe(name="r", path=Path("r.py"), resolved={}, sections={"serving": ServingConfig(model_name=named)})
    context = StageContext(
        directory=Path(),
        run_dir=Path(),
        recipe=recipe,
        inputs=inputs("int8"),
        console=None,
        command="",  # type: ignore[arg-type]
    )
    assert serving_of(context).model_name == served
