"""The ladder's rung of the exported file in ONNX Runtime's TensorRT provider, and which providers this machine has."""

from __future__ import annotations

from typing import Any

from export.ladder import Floor, Rung
from export.providers import TENSORRT, provider_reasons, session_providers
from export.runners import OnnxRuntimeRunner
from export.signature import DetectorSignature
from pipeline.accuracy import ON_CANVAS, Ladder, detections_of
from pipeline.artifact import digest
from pipeline.model_files import ONNX_MODEL, ONNX_RUNTIME
from pipeline.stage import StageContext

IN_TENSORRT = "ONNX Runtime, TensorRT provider"
NOTE = "TF32 on GPUs that have it: the provider has no switch for it"


def add_provider_rungs(ladder: Ladder, context: StageContext, signature: DetectorSignature) -> dict[str, Any]:
    """Add the rung of the provider that the rung of ONNX Runtime does not use.

    ``ONNX_RUNTIME`` runs in CUDA where it can be used, otherwise on the CPU.

    Returns:
        Why each provider cannot be used here, by name; empty where it can.
    """
    reasons, model = provider_reasons(), context.inputs["export"].path(ONNX_MODEL)
    if reasons[TENSORRT]:
        ladder.add_not_run(IN_TENSORRT, reasons[TENSORRT], digest(model))
        return reasons
    floor = Floor(points=context.recipe.sections["parity"].max_ap_drop_tensorrt)
    rung = Rung(name=IN_TENSORRT, compared_with=ONNX_RUNTIME, floors={ONNX_RUNTIME: floor, ON_CANVAS: floor})
    with OnnxRuntimeRunner(model, signature, providers=session_providers(TENSORRT)) as runner:
        ladder.add(rung, detections_of(runner, ladder.canvases()), model, NOTE)
    return reasons
