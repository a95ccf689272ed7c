"""The stages from a student checkpoint to proven portable formats: export, engine, validate."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import torch
from torch import nn

from export.detector_graph import detector_graph, signature_of
from export.parity import BatchInvariance, ParityConfig, batch_invariance
from export.runners import OnnxRuntimeRunner, TensorRTRunner, TorchRunner
from export.signature import DetectorSignature
from export.targets.onnx_target import export_onnx
from export.targets.tensorrt_target import EngineUnavailable, build_engine
from pipeline.accuracy import ON_CANVAS, REFERENCE, AccuracyTable, canvases_of, detections_of
from pipeline.artifact import digest
from pipeline.stage import Gate, StageContext, StageResult
from pipeline.training_stages import REMOVED_TENSORS_FILE, STUDENT_CHECKPOINT, dataset_of, student_of
from training.checkpoint import load_student
from training.evaluate import resolve_device

ONNX_MODEL = "model.onnx"
ENGINE = "model.plan"
PARITY_FILE = "parity.json"


def export(context: StageContext) -> StageResult:
    """Write the ONNX model and its signature; no tensor of the teacher is in it and the batch does not matter."""
    student, facts = loaded_student(context), context.inputs["data"].manifest.facts
    config = context.recipe.sections["export"]
    signature = signature_of(
        student,
        canvas=config.canvas,
        short_edge=config.short_edge_pixels,
        max_edge=config.max_edge_pixels,
        class_names=facts["class_names"],
        category_ids=facts["category_ids"],
        max_batch_size=config.max_batch_size,
    )
    path = context.directory / ONNX_MODEL
    onnx_facts = export_onnx(detector_graph(student, signature), signature, path)
    signature.write(context.directory)
    removed = set(json.loads(context.inputs["strip"].path(REMOVED_TENSORS_FILE).read_text()))
    num_teacher = len(removed & initializer_digests(path))
    canvases = [canvas for _, canvas, _ in canvases_of(dataset_of(context.inputs["data"], "validation"), signature, 5)]
    with OnnxRuntimeRunner(path, signature) as runner:
        invariance = batch_invariance(runner, canvases, score_floor=signature.score_threshold)
    gates = [
        Gate(name="teacher tensors in the ONNX model", value=num_teacher, limit=0, passed=num_teacher == 0),
        batch_gate("ONNX Runtime", invariance),
    ]
    facts = {
        **dataclasses.asdict(onnx_facts),
        "num_teacher_initializers": num_teacher,
        "batch_sizes_checked": invariance.batch_sizes,
    }
    return StageResult(facts=facts, gates=gates)


def loaded_student(context: StageContext) -> nn.Module:
    """The stripped student in the stock detector."""
    return load_student(student_of(context), context.inputs["strip"].path(STUDENT_CHECKPOINT))


def initializer_digests(path: Path) -> set[str]:
    """SHA-256 of the values of each tensor stored in an ONNX file."""
    graph = onnx.load(path).graph
    return {hashlib.sha256(onnx.numpy_helper.to_array(t).tobytes()).hexdigest() for t in graph.initializer}


def batch_gate(name: str, invariance: BatchInvariance) -> Gate:
    return Gate(
        name=f"batch invariance, {name}: detections that change with the batch",
        value=invariance.num_unmatched,
        limit=0,
        passed=invariance.num_unmatched == 0,
        reason="; ".join(invariance.failed) or f"batch sizes {', '.join(map(str, invariance.batch_sizes))}",
    )


def engine(context: StageContext) -> StageResult:
    """Build the TensorRT engine from the ONNX model; without a GPU it is built and audited, not run."""
    config, source = context.recipe.sections["export"], context.inputs["export"]
    signature = DetectorSignature.read(source.directory)
    try:
        built = build_engine(
            source.path(ONNX_MODEL),
            context.directory / ENGINE,
            signature,
            precision=config.precision,
            compute_capabilities=config.compute_capabilities,
        )
    except EngineUnavailable as error:
        return StageResult(facts={"status": "not run", "reason": str(error)})
    signature.write(context.directory)
    run = "validate runs it" if torch.cuda.is_available() else "not run: no NVIDIA GPU"
    return StageResult(
        facts={"status": "built", "reason": "", **dataclasses.asdict(built), "run": run},
        gates=[
            Gate(
                name="layer types are those of the precision asked for",
                value=", ".join(built.layers_by_dtype),
                limit=config.precision,
                passed=True,
                reason="; ".join(
                    [
                        "read from the strongly typed network before the build; a mismatch stops it",
                        *(f"not built for {name}: {reason}" for name, reason in built.excluded.items()),
                    ]
                ),
            )
        ],
    )


def validate(context: StageContext) -> StageResult:
    """AP of every format, detections matched one by one, and batch invariance."""
    # cuDNN would use TF32 for convolutions, which is not the precision that parity is about.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return _validated(context)


def _validated(context: StageContext) -> StageResult:
    limits: ParityConfig = context.recipe.sections["parity"]
    dataset = dataset_of(context.inputs["data"], "validation")
    export_artifact = context.inputs["export"]
    signature = DetectorSignature.read(export_artifact.directory)
    student = loaded_student(context).to(resolve_device(context.recipe.sections["training"].device))
    table = AccuracyTable(dataset, signature, context)

    table.add_reference(student)
    onnx_model = export_artifact.path(ONNX_MODEL)
    with TorchRunner(detector_graph(student, signature), signature) as torch_runner:
        table.add(
            ON_CANVAS,
            detections_of(torch_runner, table.canvases()),
            context.inputs["strip"].path(STUDENT_CHECKPOINT),
        )
    on_canvas = table.rows[-1]
    with OnnxRuntimeRunner(onnx_model, signature) as runner:
        found = detections_of(runner, table.canvases())
        table.add("ONNX Runtime", found, onnx_model, on_canvas, limits.max_ap_drop_onnxruntime)
        matching = table.matched_with_detectron2(student, runner, limits)
        canvases = list(table.canvases(limits.num_batch_images))
        invariance = batch_invariance(runner, canvases, score_floor=limits.min_matched_score)
    table.gates.append(batch_gate("ONNX Runtime", invariance))
    table.gates.append(
        Gate(
            name="ONNX Runtime detections without a partner in detectron2's",
            value=matching.num_unmatched,
            limit=0,
            passed=matching.num_unmatched == 0,
            reason=f"{matching.num_matched} matched on {matching.num_images} images",
        )
    )
    _add_tensorrt(table, context, signature, on_canvas, limits.max_ap_drop_tensorrt)
    facts = {
        "rows": table.rows,
        "matching": dataclasses.asdict(matching),
        "batch_invariance": dataclasses.asdict(invariance),
        "per_class": table.per_class(REFERENCE, "ONNX Runtime"),
    }
    (context.directory / PARITY_FILE).write_text(json.dumps({**facts, "gates": table.gates}, indent=1, default=vars))
    return StageResult(facts=facts, gates=table.gates)


def _add_tensorrt(
    table: AccuracyTable, context: StageContext, signature: DetectorSignature, on_canvas: dict[str, Any], limit: float
) -> None:
    built = context.inputs["engine"]
    if built.manifest.facts["status"] != "built":
        table.add_not_run("TensorRT", built.manifest.facts["reason"])
        return
    try:
        with TensorRTRunner(built.path(ENGINE), signature) as runner:
            found = detections_of(runner, table.canvases())
            table.add("TensorRT", found, built.path(ENGINE), on_canvas, limit)
    except EngineUnavailable as error:
        reason = "no NVIDIA GPU" if not torch.cuda.is_available() else str(error)
        table.add_not_run("TensorRT", reason, digest(built.path(ENGINE)))
