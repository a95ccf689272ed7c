"""The stage that writes the exported model in the precision asked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.config import AS_EXPORTED, ExportConfig
from export.cpu_quantization import write_cpu_int8
from export.precision import ConversionFacts, num_calibration_images, write_typed_onnx
from export.precision_audit import MIN_SHARE, compute_layers
from export.signature import DetectorSignature
from pipeline.model_files import CPU_ONNX_MODEL, ONNX_MODEL
from pipeline.stage import Gate, StageContext, StageResult
from pipeline.training_stages import dataset_of
from serving.preprocessing import canvas_from_image, read_image
from training.dataset import CocoDataset, detectron2_dicts

LAYERS_FILE = "compute_layers.json"


def precision(context: StageContext) -> StageResult:
    """Convert the exported model, calibrated on training images; float32 stays the export's own file."""
    config: ExportConfig = context.recipe.sections["export"]
    source = context.inputs["export"]
    facts: dict[str, Any] = {"precision": config.precision, "converted": config.precision not in AS_EXPORTED}
    if not facts["converted"]:
        facts["reason"] = "float32 as exported: nothing to convert, later stages read the export's file"
        _write_layers(context.directory, {ONNX_MODEL: source.path(ONNX_MODEL)}, config.precision)
        return StageResult(facts=facts)
    signature = DetectorSignature.read(source.directory)
    images = _calibration_images(dataset_of(context.inputs["data"], "train"), signature, config)
    written = {
        ONNX_MODEL: write_typed_onnx(source.path(ONNX_MODEL), context.directory / ONNX_MODEL, config.precision, images)
    }
    if config.precision == "int8":
        written[CPU_ONNX_MODEL] = write_cpu_int8(source.path(ONNX_MODEL), context.directory / CPU_ONNX_MODEL, images)
    signature.write(context.directory)
    _write_layers(context.directory, {name: context.directory / name for name in written}, config.precision)
    facts["files"] = {name: dataclasses.asdict(conversion) for name, conversion in written.items()}
    return StageResult(facts=facts, gates=[gate for name, each in written.items() for gate in _gates(name, each)])


def _calibration_images(dataset: CocoDataset, signature: DetectorSignature, config: ExportConfig) -> np.ndarray:
    """Training images on the canvas, spread evenly over the set, (N, 3, H, W) uint8."""
    records = detectron2_dicts(dataset)
    number = num_calibration_images(config, len(records))
    chosen = np.linspace(0, len(records) - 1, number).round().astype(int)
    images = np.empty((number, *signature.image_shape), np.uint8)
    for position, index in enumerate(chosen):
        images[position] = canvas_from_image(read_image(Path(records[index]["file_name"])), signature)[0]
    return images


def _write_layers(directory: Path, files: dict[str, Path], precision: str) -> None:
    """Every convolution and matrix product of each file: its type, and why it may have another than asked for."""
    layers = {
        name: [dataclasses.asdict(layer) for layer in compute_layers(onnx.load(path), precision)]
        for name, path in files.items()
    }
    (directory / LAYERS_FILE).write_text(json.dumps(layers, indent=1))


def _gates(name: str, conversion: ConversionFacts) -> list[Gate]:
    """What was held before the file was written; a mismatch raises."""
    return [
        Gate(
            name=f"{name}: share of multiplications in the precision asked for",
            value=conversion.share,
            limit=MIN_SHARE,
            passed=True,
            reason=f"outside the layers that {LAYERS_FILE} calls exempt; a mismatch stops the stage",
        ),
        Gate(
            name=f"{name}: nodes of decoding and NMS that do not compute in float32",
            value=0,
            limit=0,
            passed=True,
            reason=f"{conversion.num_float32_nodes} nodes; a mismatch stops the stage",
        ),
    ]
