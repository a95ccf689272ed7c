"""The cells of the export matrix, the detectors behind them, and why a cell does not run here."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
from torch import nn

from export.config import AS_EXPORTED, ExportConfig
from export.cpu_quantization import write_cpu_int8
from export.detector_graph import detector_graph
from export.precision import ModelOptMissing, write_typed_onnx
from export.precision_audit import TYPE_OF
from export.runners import OnnxRuntimeRunner, Runner, TensorRTRunner, TorchRunner, usable_providers
from export.signature import Detections
from export.targets.onnx_target import OnnxFacts, export_onnx
from export.targets.tensorrt_target import EngineUnavailable, build_engine
from pipeline.accuracy import detectron2_on_canvas
from tests.conformance.small_detectors import BACKBONES, CANVAS, FAMILIES, small_detector
from tests.export.conftest import canvases, signature_for

TORCH, CPU, CUDA, ENGINE, CPU_INT8 = (
    "torch",
    "ONNX Runtime CPU",
    "ONNX Runtime CUDA",
    "TensorRT engine",
    "CPU int8 file",
)
TARGETS = (TORCH, CPU, CUDA, ENGINE, CPU_INT8)
PRECISIONS = tuple(TYPE_OF)
ROW, COLUMN = "RetinaNet", "ResNet-18"
"""The family that goes with every backbone, and the backbone that goes with every family, at every precision."""
NUM_IMAGES, NUM_CALIBRATION_IMAGES = 3, 8


class Cell(NamedTuple):
    family: str
    backbone: str
    target: str
    precision: str

    def __str__(self) -> str:
        return "/".join(self)


CELLS = [Cell(*each) for each in itertools.product(FAMILIES, BACKBONES, TARGETS, PRECISIONS)]


class NotRun(Exception):
    """The cell cannot run here, or need not; says why."""


class Exported:
    """A small detector, what detectron2 finds with it, and its files; each is made when it is first asked for."""

    def __init__(self, family: str, backbone: str, folder: Path) -> None:
        self.folder = folder
        self.detector: nn.Module = small_detector(family, backbone)
        self.signature = signature_for(self.detector, *CANVAS)
        self.graph = detector_graph(self.detector, self.signature)
        self.images = np.stack(canvases(*CANVAS, NUM_IMAGES, seed=3))
        with torch.no_grad():
            self.references: list[Detections] = [detectron2_on_canvas(self.detector, image) for image in self.images]
        self._typed: dict[str, Path] = {}

    @functools.cached_property
    def facts(self) -> OnnxFacts:
        return export_onnx(self.graph, self.signature, self.folder / "model.onnx")

    @functools.cached_property
    def path(self) -> Path:
        """The exported float32 file."""
        assert self.facts.num_nodes
        return self.folder / "model.onnx"

    @functools.cached_property
    def calibration_images(self) -> np.ndarray:
        return np.stack(canvases(*CANVAS, NUM_CALIBRATION_IMAGES, seed=5))

    def typed(self, precision: str) -> Path:
        """The file that has the precision; its audit is part of writing it."""
        if precision in AS_EXPORTED:
            return self.path
        if precision not in self._typed:
            path = self.folder / f"model_{precision}.onnx"
            write_typed_onnx(self.path, path, precision, self.calibration_images)
            self._typed[precision] = path
        return self._typed[precision]

    def cpu_int8(self) -> Path:
        path = self.folder / "model_cpu.onnx"
        write_cpu_int8(self.path, path, self.calibration_images)
        return path


def check_runs(cell: Cell) -> None:
    """Raise :class:`NotRun` for what is known before anything is made."""
    if cell.target == CPU_INT8 and cell.precision != "int8":
        raise NotRun("ONNX Runtime's own quantization makes int8 alone")
    if cell.target == TORCH and cell.precision != "fp32":
        raise NotRun("the export graph in torch is float32; precision is of the files made from it")
    if cell.target != ENGINE and cell.precision == "tf32":
        raise NotRun("tf32 is a flag of the engine; the file is that of fp32")
    if cell.target == CUDA and len(usable_providers()) == 1:
        raise NotRun("no NVIDIA GPU that ONNX Runtime can use")
    is_exact = cell.precision == "fp32" and cell.target in (TORCH, CPU)
    if not (is_exact or cell.family == ROW or cell.backbone == COLUMN):
        raise NotRun(f"cost: covered by {ROW} on {cell.backbone} and {cell.family} on {COLUMN}")


def runner_of(cell: Cell, exported: Exported) -> Runner:
    """What runs the cell.

    Raises:
        NotRun: something that it needs is not on this machine, as the code itself says.
    """
    try:
        return _runner_of(cell, exported)
    except (ModelOptMissing, EngineUnavailable) as error:
        raise NotRun(str(error)) from error
    except NoKernel as error:
        operator = str(error).partition(" node with name")[0].rpartition("NOT_IMPLEMENTED : ")[2]
        raise NotRun(f"ONNX Runtime has no kernel for {cell.precision}: {operator}") from error


def _runner_of(cell: Cell, exported: Exported) -> Runner:
    signature = exported.signature
    if cell.target == TORCH:
        return TorchRunner(exported.graph, signature)
    if cell.target == ENGINE:
        return _engine_runner(exported, cell.precision)
    path = exported.cpu_int8() if cell.target == CPU_INT8 else exported.typed(cell.precision)
    providers = usable_providers() if cell.target == CUDA else ["CPUExecutionProvider"]
    return OnnxRuntimeRunner(
        path,
        signature,
        num_threads=1,
        allow_spinning=False,
        providers=providers,
        optimize=cell.precision != "fp8",  # ONNX Runtime 1.31's optimizer fails on it
    )


def _engine_runner(exported: Exported, precision: str) -> Runner:
    plan = exported.folder / f"model_{precision}.plan"
    build_engine(
        exported.typed(precision),
        plan,
        exported.signature,
        precision=precision,
        compute_capabilities=(_capability(),),
    )
    try:
        return TensorRTRunner(plan, exported.signature)
    except EngineUnavailable as error:
        raise NotRun(f"built and audited, not run: {str(error).replace(str(plan), 'the plan')}") from error


def _capability() -> str:
    """This machine's GPU where TensorRT-RTX builds for it, otherwise one that has every precision."""
    found = "".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else ""
    return found if found in ExportConfig().compute_capabilities else "89"
