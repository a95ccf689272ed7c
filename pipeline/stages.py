"""The stages, in order: each reads artifacts, calls one package and writes an artifact.

The functions are imported when a stage runs, so that asking for a run's status does not load torch.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

from export.config import AS_EXPORTED
from pipeline.artifact import digest
from pipeline.recipe import FOLDER_RECIPE, Recipe
from pipeline.run import RunSummary
from pipeline.stage import Stage, StageContext, StageResult


def _from(module: str, function: str) -> Callable[[StageContext], StageResult]:
    def run(context: StageContext) -> StageResult:
        return getattr(importlib.import_module(f"pipeline.{module}"), function)(context)

    return run


def _starting_weights(recipe: Recipe) -> Mapping[str, str]:
    """Digests of the files that training starts from; model-zoo addresses name their content themselves."""
    from training.backbones.timm_backbone import weights_path

    bottom_up = recipe.model.backbone.get("bottom_up", recipe.model.backbone)
    named = {
        "backbone weights": bottom_up.get("weights"),
        "init_checkpoint": recipe.sections["training"].init_checkpoint,
    }
    paths = {name: weights_path(value) for name, value in named.items() if value and "://" not in value}
    return {name: digest(path) for name, path in paths.items() if path.is_file()}


def _docker(recipe: Recipe) -> Mapping[str, str]:
    """Whether a Docker engine answers, where the recipe serves from a container."""
    from pipeline.endpoint import not_executable

    reason = not_executable(recipe.sections["serving"])
    return {} if reason is None else {"not executable": reason}


def _dataset_digests(recipe: Recipe) -> Mapping[str, str]:
    """Digests of the user's own data set; the embedded one follows from the recipe."""
    return _digests(recipe, "own_datasets")


def _digests(recipe: Recipe, reader: str) -> Mapping[str, str]:
    config = recipe.sections["dataset"]
    if config.is_embedded:
        return {}
    splits = getattr(importlib.import_module("training.dataset_formats"), reader)(config)
    return {split: own.digest(include_pixels=config.digest_pixels) for split, own in splits.items()}


def _conversion_tool(recipe: Recipe) -> Mapping[str, str]:
    """The versions of the tool that makes the precision, where there is something to make."""
    if recipe.sections["export"].precision in AS_EXPORTED:
        return {}
    return {"NVIDIA ModelOpt": digest(Path(__file__).resolve().parents[1] / "requirements" / "precision.txt")}


STAGES = (
    Stage(
        name="data",
        version=1,
        inputs=(),
        config_sections=("dataset",),
        external_inputs=_dataset_digests,
        run=_from("training_stages", "data"),
    ),
    Stage(
        name="train",
        version=2,
        inputs=("data",),
        config_sections=("model", "training", "distiller"),
        external_inputs=_starting_weights,
        run=_from("training_stages", "train"),
        resumable=True,
    ),
    Stage(
        name="strip",
        version=1,
        inputs=("data", "train"),
        config_sections=("model", "distiller", "export"),
        run=_from("training_stages", "strip"),
    ),
    Stage(
        name="export",
        version=2,
        inputs=("data", "strip"),
        config_sections=("model", "export"),
        environment_keys=("torch", "onnx"),
        run=_from("export_stages", "export"),
    ),
    Stage(
        name="precision",
        version=1,
        inputs=("data", "export"),
        config_sections=("export",),
        environment_keys=("onnx", "onnxruntime"),
        external_inputs=_conversion_tool,
        run=_from("precision_stage", "precision"),
    ),
    Stage(
        name="engine",
        version=3,
        inputs=("export", "precision"),
        config_sections=("export",),
        environment_keys=("tensorrt", "tensorrt_rtx", "gpus", "cuda_visible_devices"),
        run=_from("export_stages", "engine"),
    ),
    Stage(
        name="validate",
        version=3,
        inputs=("data", "strip", "export", "precision", "engine"),
        config_sections=("model", "export", "parity", "training"),
        environment_keys=("torch", "detectron2", "onnxruntime", "gpus"),
        run=_from("export_stages", "validate"),
    ),
    Stage(
        name="deploy",
        version=2,
        inputs=("data", "export", "precision", "engine", "validate"),
        config_sections=("parity", "serving"),
        environment_keys=("onnxruntime", "tritonserver", "gpus"),
        external_inputs=_docker,
        run=_from("serving_stages", "deploy"),
    ),
    Stage(
        name="benchmark",
        version=2,
        inputs=("data", "export", "precision", "engine", "deploy"),
        config_sections=("serving", "benchmark"),
        environment_keys=("onnxruntime", "tritonserver", "gpus", "cpu", "num_cores"),
        external_inputs=_docker,
        run=_from("serving_stages", "benchmark"),
    ),
    Stage(
        name="report",
        version=2,
        inputs=("data", "train", "strip", "export", "precision", "engine", "validate", "deploy", "benchmark"),
        config_sections=(),
        run=_from("report_stage", "report"),
        always=True,
    ),
)

# Of a model that was trained elsewhere: its checkpoint is imported instead of trained and stripped.
_IMPORTING = {
    "data": Stage(
        name="data",
        version=1,
        inputs=(),
        config_sections=("dataset", "training"),
        external_inputs=lambda recipe: _digests(recipe, "datasets_to_measure_on"),
        run=_from("import_stages", "data"),
    ),
    "strip": Stage(
        name="strip",
        version=1,
        inputs=("data",),
        config_sections=("model", "training"),
        run=_from("import_stages", "strip"),
    ),
}
IMPORTED_STAGES = tuple(
    dataclasses.replace(stage, inputs=tuple(name for name in stage.inputs if name != "train"))
    for stage in (_IMPORTING.get(stage.name, stage) for stage in STAGES)
    if stage.name != "train"
)


def stages_in(run_dir: Path) -> tuple[Stage, ...]:
    """The stages of the run in a folder; only a model that was trained elsewhere has its recipe there."""
    return IMPORTED_STAGES if (run_dir / FOLDER_RECIPE).is_file() else STAGES


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a recipe's run."""
    return STAGES if recipe.folder is None else IMPORTED_STAGES


def report_paths(run_dir: Path) -> list[Path]:
    """The report's files that are there, the one for people first."""
    return [path for suffix in ("html", "md", "json") if (path := run_dir / "report" / f"report.{suffix}").is_file()]


def _how_to_query(run_dir: Path) -> list[str]:
    from pipeline.endpoint import deployed

    facts = deployed(run_dir).manifest.facts  # the published version lies outside the artifacts, so it is verified here
    if facts["status"] == "not run":
        return [f"serve it:   {facts['container']['command']}"]
    query = "query it:   .venv/bin/python -m pipeline detect IMAGE --draw detections.png"
    if ":" in facts["server"]:
        return [f"served at:  {facts['server']}", f"{query} --url {facts['server']} --model {facts['model_name']}"]
    runs = "" if run_dir.parent == Path("runs") else f' ARGS="--runs {run_dir.parent}"'
    name = "" if run_dir.name == "embedded" else f" NAME={run_dir.name}"
    return [f"serve it:   make serve{name}{runs}", query]


def after_run(run_dir: Path, summary: RunSummary) -> list[str]:
    """What to tell after a run: what it did, where the report is, how to serve and query the model."""
    lines = [] if summary.num_built else ["nothing to do: every artifact is up to date and its files verify"]
    stages = {outcome.stage for outcome in summary.outcomes}
    if "deploy" in stages:
        lines += _how_to_query(run_dir)
    if "report" in stages:
        lines += [f"report:     {path}" for path in report_paths(run_dir)[:1]]
    return lines
