"""More canvases of one checkpoint (``export.canvases``): an ONNX model of each, and the AP that each gives.

Each has a folder in the export artifact, ``canvas_<height>x<width>``, with a model and a signature of its own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from export.config import ExportConfig
from export.detector_graph import detector_graph
from export.ladder import Rung
from export.parity import ParityConfig
from export.runners import OnnxRuntimeRunner
from export.signature import DetectorSignature
from export.targets.onnx_target import export_onnx
from pipeline.accuracy import ON_CANVAS, REFERENCE, Ladder, detections_of, detectron2_on_canvas
from pipeline.model_files import ONNX_MODEL
from pipeline.stage import StageContext


def canvas_name(signature: DetectorSignature) -> str:
    """Of the canvas's row, which ONNX Runtime gives, and of its gates."""
    return f"canvas {signature.canvas_height} x {signature.canvas_width}"


def other_signatures(signature: DetectorSignature, config: ExportConfig) -> list[DetectorSignature]:
    """The signature of each of ``export.canvases``; images are as large as the canvas lets them be."""
    return [
        dataclasses.replace(
            signature,
            canvas_height=height,
            canvas_width=width,
            short_edge_pixels=min(height, width),
            max_edge_pixels=max(height, width),
        )
        for height, width in config.canvases
    ]


def export_other_canvases(
    student: nn.Module, signature: DetectorSignature, config: ExportConfig, directory: Path
) -> dict[DetectorSignature, Path]:
    """Write model and signature of each of ``export.canvases`` below ``directory``; the models by signature."""
    models = {}
    for other in other_signatures(signature, config):
        path = directory / _folder(other) / ONNX_MODEL
        path.parent.mkdir()
        other.write(path.parent)
        graph = detector_graph(student, other, config.nms)
        export_onnx(graph, other, path, ends_at_candidates=config.nms == "outside")
        models[other] = path
    return models


def add_other_canvases(ladder: Ladder, context: StageContext, student: nn.Module) -> None:
    """Give ``ladder`` a rung of each canvas, beside the first, and hold it to detectron2 on that canvas.

    What a canvas costs is a choice, so no AP fails the run; detections other than detectron2's do.
    """
    limits: ParityConfig = context.recipe.sections["parity"]
    artifact = context.inputs["export"]
    for signature in other_signatures(DetectorSignature.read(artifact.directory), context.recipe.sections["export"]):
        model = artifact.path(f"{_folder(signature)}/{ONNX_MODEL}")
        own = ladder.on_another_canvas(signature)
        with OnnxRuntimeRunner(model, signature) as runner:
            rung = Rung(name=canvas_name(signature), compared_with=REFERENCE)
            own.add(rung, detections_of(runner, own.canvases()), model)
        canvases = own.canvases(limits.num_matching_images)
        own.remember(ON_CANVAS, [detectron2_on_canvas(student, canvas) for canvas in canvases])
        own.match(rung.name, ON_CANVAS)


def _folder(signature: DetectorSignature) -> str:
    return f"canvas_{signature.canvas_height}x{signature.canvas_width}"
