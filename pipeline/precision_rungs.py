"""The ladder's rungs of the files in the precision asked for, and what a precision may lose."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from export.float32_tail import own_and_exported_tail
from export.head_tensors import HeadDifference, head_differences, onnx_head_tensors
from export.ladder import Floor, Rung
from export.parity import ParityConfig
from export.precision_audit import QUANTIZED
from export.runners import OnnxRuntimeRunner
from export.signature import DetectorSignature
from pipeline import environment
from pipeline.accuracy import ON_CANVAS, Ladder, detections_of
from pipeline.artifact import digest
from pipeline.model_files import ONNX_MODEL, ONNX_RUNTIME, ModelFile, converted_files, precision_of, typed_onnx
from pipeline.stage import StageContext


def add_precision_rungs(ladder: Ladder, context: StageContext, signature: DetectorSignature) -> str:
    """Add a rung of every file of the precision stage in ONNX Runtime, so that what it loses shows without a GPU.

    Returns:
        The rung to compare the engine with: of the file that it is built from; of the exported one where that file
        cannot run here.
    """
    precision, source = precision_of(context.inputs), ONNX_RUNTIME
    floors = {ON_CANVAS: floor_of(precision, context.recipe.sections["parity"])}
    for file in converted_files(context.inputs):
        if not runs_here(precision):
            ladder.add_not_run(file.row, "ONNX Runtime has no bfloat16 kernels on a CPU", digest(file.path))
            continue
        rung = Rung(name=file.row, compared_with=ONNX_RUNTIME, floors=floors)
        with OnnxRuntimeRunner(file.path, signature, optimize=_may_optimize(precision)) as runner:
            ladder.add(rung, detections_of(runner, ladder.canvases()), file.path)
        _hold_tail(ladder, context, signature, file)
        if file.path == typed_onnx(context.inputs):
            source = file.row
    return source


def _hold_tail(ladder: Ladder, context: StageContext, signature: DetectorSignature, file: ModelFile) -> None:
    """Hold a converted file to the exported decoding and NMS on its own trunk's values, detection by detection.

    A floor of AP alone would let through a fault after the trunk that costs no more AP than the precision may.
    """
    own, exported = own_and_exported_tail(
        file.path,
        context.inputs["export"].path(ONNX_MODEL),
        signature,
        ladder.canvases(context.recipe.sections["parity"].num_matching_images),
        optimize=_may_optimize(precision_of(context.inputs)),
    )
    name = f"the exported decoding and NMS on what the trunk of {file.row} makes"
    ladder.remember(file.row, own)  # of the session that gave the trunk's values; another may round otherwise
    ladder.remember(name, exported)
    ladder.match(file.row, name)


def floor_of(precision: str, limits: ParityConfig) -> Floor:
    """How far below torch on the canvas a converted file, or an engine of it, may lie."""
    if precision in QUANTIZED:
        return Floor(share=1 - limits.min_ap_share_quantized)
    return Floor(points=limits.max_ap_drop_half)


def precision_head_differences(context: StageContext, canvases: Iterable[np.ndarray]) -> list[HeadDifference]:
    """Each converted file's head tensors beside the exported file's, as far as the conversion left them.

    Args:
        canvases: (3, H, W) uint8 each.
    """
    precision, images = precision_of(context.inputs), list(canvases)
    files = converted_files(context.inputs) if runs_here(precision) else []
    if not files:
        return []
    exported = onnx_head_tensors(context.inputs["export"].path(ONNX_MODEL))
    return [
        difference
        for file in files
        for difference in head_differences(
            {ONNX_RUNTIME: exported, file.row: onnx_head_tensors(file.path, optimize=_may_optimize(precision))}, images
        )
    ]


def runs_here(precision: str) -> bool:
    """Whether ONNX Runtime has the precision's kernels on this machine."""
    return precision != "bf16" or bool(environment.facts()["gpus"])


def _may_optimize(precision: str) -> bool:
    """ONNX Runtime 1.31's optimizer makes fp8 graphs that it refuses itself."""
    return precision != "fp8"
