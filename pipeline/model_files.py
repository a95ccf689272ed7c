"""Which file of a run is the detector: as exported, in the precision asked for, for CPUs, or as an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from export.config import AS_EXPORTED
from export.precision_audit import TYPE_OF
from export.runners import OnnxRuntimeRunner, Runner, TensorRTRunner
from export.signature import DetectorSignature
from pipeline.artifact import Artifact
from pipeline.endpoint import uses_gpu
from pipeline.stage import StageContext
from serving.config import ServingConfig

ONNX_MODEL = "model.onnx"
CPU_ONNX_MODEL = "model_cpu.onnx"
ENGINE = "model.plan"
ONNX_RUNTIME = "ONNX Runtime"
TENSORRT = "TensorRT"


class ModelFile(NamedTuple):
    """A file, the artifact it is of, and the rung of validate that runs it."""

    row: str
    artifact: Artifact
    name: str

    @property
    def path(self) -> Path:
        return self.artifact.path(self.name)


def precision_of(inputs: Mapping[str, Artifact]) -> str:
    """The precision that the run's files have."""
    return str(inputs["precision"].manifest.facts["precision"])


def typed_onnx(inputs: Mapping[str, Artifact]) -> Path:
    """The ONNX file in the precision asked for: the export's own where there was nothing to convert."""
    return inputs["export" if precision_of(inputs) in AS_EXPORTED else "precision"].path(ONNX_MODEL)


def converted_files(inputs: Mapping[str, Artifact]) -> list[ModelFile]:
    """What the precision stage wrote, that for CPUs first; nothing where the exported file is taken as it is."""
    made, precision = inputs["precision"], precision_of(inputs)
    if precision in AS_EXPORTED:
        return []
    if precision != "int8":
        return [ModelFile(f"{ONNX_RUNTIME}, {precision}", made, ONNX_MODEL)]
    return [
        ModelFile(f"{ONNX_RUNTIME}, int8 (CPU)", made, CPU_ONNX_MODEL),
        ModelFile(f"{ONNX_RUNTIME}, int8 (TensorRT's file)", made, ONNX_MODEL),
    ]


def served_file(inputs: Mapping[str, Artifact], config: ServingConfig) -> ModelFile:
    """What the recipe's server gets."""
    if config.serves_engine:
        return ModelFile(TENSORRT, inputs["engine"], ENGINE)
    converted = converted_files(inputs)
    if not converted:
        return ModelFile(ONNX_RUNTIME, inputs["export"], ONNX_MODEL)
    return converted[-1 if uses_gpu(config) else 0]


def serving_of(context: StageContext) -> ServingConfig:
    """The recipe's ``serving`` section, with the run's precision where its model name ends with another."""
    config: ServingConfig = context.recipe.sections["serving"]
    stem, _, named = config.model_name.rpartition("_")
    if named not in TYPE_OF:
        return config
    return dataclasses.replace(config, model_name=f"{stem}_{precision_of(context.inputs)}")


def runner_in_process(served: ModelFile, signature: DetectorSignature, config: ServingConfig) -> Runner:
    """Runs the file here as the recipe's server runs it."""
    if served.row == TENSORRT:
        return TensorRTRunner(served.path, signature)
    return OnnxRuntimeRunner(
        served.path, signature, num_threads=config.num_threads, allow_spinning=config.allow_spinning
    )
