"""An exported float32 ONNX file → the same detector in the precision asked for, and for CPUs an int8 file of their own.

NVIDIA ModelOpt converts the trunk; the result is checked against the rule of :mod:`export.precision_audit` before it is
written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from export.config import AS_EXPORTED, ExportConfig
from export.deformable_sampling import as_samples, position_nodes
from export.precision_audit import (
    QUANTIZED,
    check_float32_tail,
    check_precision,
    compute_layers,
    num_layers_by_type,
)
from export.trunk import outermost, trunk_of, with_trunk

MODELOPT = Path(__file__).resolve().parents[1] / ".modelopt"
_TOOL = Path(__file__).with_name("modelopt_conversion.py")
_AUTOCAST_PIXELS = 32 * 256 * 256  # of all its images: it keeps every tensor of every image until the end


class ModelOptMissing(RuntimeError):
    """NVIDIA ModelOpt, which makes the precision asked for, is not installed."""

    exit_code = 4


class TooFewCalibrationImages(ValueError):
    """The training set has fewer images than int8 or fp8 are to be calibrated on."""

    exit_code = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionFacts:
    """What a converted file contains.

    Attributes:
        method: what wrote it.
        num_calibration_images: training images that its ranges come from.
        layers_by_type: number of convolutions and matrix products of each type.
        share: of the multiplications outside the exempt layers, those in the precision asked for.
        num_float32_nodes: nodes of the tail, all of which compute in float32.
        size_bytes: of the file.
        seconds: that it took.
    """

    method: str
    num_calibration_images: int
    layers_by_type: dict[str, int]
    share: float
    num_float32_nodes: int
    size_bytes: int
    seconds: float


def check_modelopt(precision: str) -> None:
    """Raise :class:`ModelOptMissing` when the precision needs ModelOpt and it is not installed."""
    if precision not in AS_EXPORTED and not (MODELOPT / "installed").is_file():
        raise ModelOptMissing(
            f"export.precision={precision} is made by NVIDIA ModelOpt, which is not installed in {MODELOPT}: "
            "`make setup-precision` installs it (0.2 GB), or leave export.precision at fp32"
        )


def num_calibration_images(config: ExportConfig, num_training_images: int) -> int:
    """How many training images the precision is calibrated on.

    Raises:
        TooFewCalibrationImages: int8 or fp8, and the training set has fewer than ``export.num_calibration_images``.
    """
    wanted = config.num_calibration_images
    if config.precision in QUANTIZED and wanted > num_training_images:
        raise TooFewCalibrationImages(
            f"export.precision={config.precision} is to be calibrated on {wanted} training images and the training set "
            f"has {num_training_images}: give export.num_calibration_images={num_training_images} to calibrate on all "
            "of them, which may cost AP (validate measures it), or export.precision=fp16, which needs few"
        )
    if config.precision in QUANTIZED:
        return wanted
    height, width = config.canvas
    return min(num_training_images, max(2, _AUTOCAST_PIXELS // (height * width)))


def write_typed_onnx(source: Path, target: Path, precision: str, images: np.ndarray) -> ConversionFacts:
    """Write ``source`` in the precision asked for, strongly typed: with the types that it is to compute in.

    Args:
        source: from :func:`export.targets.onnx_target.export_onnx`, float32.
        target: the file to write; it appears under its name only when it is whole and keeps the rule.
        precision: "fp16", "bf16", "int8" or "fp8".
        images: uint8 (N, 3, H, W), training images on the canvas; what the ranges are measured on.

    Raises:
        ModelOptMissing: it is not installed.
        UnsupportedDeformConv: a deformable convolution cannot be written in operators that TensorRT has.
        PrecisionMismatch: the conversion does not keep the rule.
    """
    check_modelopt(precision)
    start = time.monotonic()
    model = as_samples(onnx.load(source))
    trunk = trunk_of(model)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        converted = _converted(trunk, precision, images, Path(scratch).resolve())  # where the tool runs
    method = (
        "AutoCast" if precision not in QUANTIZED else "Q/DQ, scales by " + ("entropy", "maximum")[precision == "fp8"]
    )
    return write_checked(
        with_trunk(model, converted), target, precision, f"NVIDIA ModelOpt: {method}", len(images), start
    )


def write_checked(
    model: ModelProto, target: Path, precision: str, method: str, num_images: int, start: float
) -> ConversionFacts:
    """Write a converted model, if it keeps the rule of the precision."""
    layers = compute_layers(model, precision)
    share = check_precision(layers, precision, target.name)
    num_float32_nodes = check_float32_tail(model, target.name)
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(model.SerializeToString())
    os.replace(partial, target)
    return ConversionFacts(
        method=method,
        num_calibration_images=num_images,
        layers_by_type=num_layers_by_type(layers),
        share=share,
        num_float32_nodes=num_float32_nodes,
        size_bytes=target.stat().st_size,
        seconds=time.monotonic() - start,
    )


def _converted(trunk: ModelProto, precision: str, images: np.ndarray, scratch: Path) -> ModelProto:
    """The trunk as ModelOpt converts it, in a process with ModelOpt's own versions of ONNX and ONNX Runtime."""
    paths = {name: str(scratch / f"{name}.onnx") for name in ("source", "target")}
    onnx.save(trunk, paths["source"])
    calibration = scratch / "calibration.npz"
    np.savez(calibration, **{trunk.graph.input[0].name: images})
    float32_nodes = [*position_nodes(trunk), *(outermost(trunk) if precision in QUANTIZED else ())]
    tool = "quantize" if precision in QUANTIZED else "autocast"
    options = {**paths, "precision": precision, "calibration": str(calibration), "float32_nodes": float32_nodes}
    job = {"tool": tool, "options": options}
    (scratch / "job.json").write_text(json.dumps(job))
    _run([str(_TOOL), str(scratch / "job.json")], scratch)
    return onnx.load(paths["target"])


def _run(arguments: Sequence[str], directory: Path) -> None:
    # -P: the tool's folder would come before ModelOpt's.
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(MODELOPT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"precision: NVIDIA ModelOpt failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
