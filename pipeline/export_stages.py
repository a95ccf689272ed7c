"""The stages from a student checkpoint to proven portable formats: export, engine, validate."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from torch import nn

from export.config import AS_EXPORTED
from export.detector_graph import detector_graph, signature_of
from export.head_tensors import (
    HeadDifference,
    detectron2_head_tensors,
    graph_head_tensors,
    head_differences,
    onnx_head_tensors,
)
from export.ladder import Floor, Rung
from export.parity import BatchInvariance, MatchResult, ParityConfig, batch_invariance
from export.runners import OnnxRuntimeRunner, TensorRTRunner, TorchRunner
from export.signature import DetectorSignature
from export.targets.onnx_target import export_onnx
from export.targets.tensorrt_target import EngineUnavailable, build_engine
from export.targets.timing_cache import TIMING_CACHE
from export.unsupported_layer import unsupported_layer_named
from pipeline.accuracy import ON_CANVAS, REFERENCE, Ladder, canvases_of, detections_of, detectron2_on_canvas
from pipeline.artifact import digest
from pipeline.model_files import ENGINE, ONNX_MODEL, ONNX_RUNTIME, TENSORRT, precision_of, typed_onnx
from pipeline.other_canvases import add_other_canvases, canvas_name, export_other_canvases
from pipeline.precision_rungs import add_precision_rungs, floor_of, precision_head_differences
from pipeline.provider_rungs import add_provider_rungs
from pipeline.stage import Gate, StageContext, StageResult
from pipeline.training_stages import REMOVED_TENSORS_FILE, STUDENT_CHECKPOINT, dataset_of, student_of
from serving.preprocessing import canvas_from_image
from training.checkpoint import load_student
from training.embedded_sources import photo, photos
from training.evaluate import resolve_device

PARITY_FILE = "parity.json"
GRAPH = "torch, export graph"
NUM_PROBE_CANVASES = 5
NUM_HEAD_IMAGES = 4


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
    graph = detector_graph(student, signature, config.nms)
    with unsupported_layer_named(graph, signature):
        onnx_facts = export_onnx(graph, signature, path, ends_at_candidates=config.nms == "outside")
    signature.write(context.directory)
    others = export_other_canvases(student, signature, config, context.directory)
    removed = set(json.loads(context.inputs["strip"].path(REMOVED_TENSORS_FILE).read_text()))
    num_teacher = sum(len(removed & initializer_digests(model)) for model in (path, *others.values()))
    canvases = probe_canvases(context, signature)
    with OnnxRuntimeRunner(path, signature) as runner:
        invariance = batch_invariance(runner, canvases, score_floor=signature.score_threshold)
    gates = [
        Gate(name="teacher tensors in the ONNX model", value=num_teacher, limit=0, passed=num_teacher == 0),
        batch_gate("ONNX Runtime", invariance),
    ]
    for other, model in others.items():
        with OnnxRuntimeRunner(model, other) as runner:
            found = batch_invariance(runner, probe_canvases(context, other), score_floor=other.score_threshold)
        gates.append(batch_gate(canvas_name(other), found))
    facts = {
        **dataclasses.asdict(onnx_facts),
        "nms": config.nms,
        "num_teacher_initializers": num_teacher,
        "batch_sizes_checked": invariance.batch_sizes,
    }
    return StageResult(facts=facts, gates=gates)


def probe_canvases(context: StageContext, signature: DetectorSignature) -> list[np.ndarray]:
    """The first validation images; photos of the embedded data set where the run has no images."""
    data = context.inputs["data"]
    if "validation" in data.manifest.facts:
        return [canvas for _, canvas, _ in canvases_of(dataset_of(data, "validation"), signature, NUM_PROBE_CANVASES)]
    pictures = [np.asarray(photo(path)) for path in photos("validation")[:NUM_PROBE_CANVASES]]
    return [canvas_from_image(picture, signature)[0] for picture in pictures]


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
            typed_onnx(context.inputs),
            context.directory / ENGINE,
            signature,
            precision=config.precision,
            compute_capabilities=config.compute_capabilities,
            min_batch_size=config.min_batch_size,
            opt_batch_size=config.opt_batch_size,
            previous_timing_cache=context.run_dir / "engine" / TIMING_CACHE,
        )
    except EngineUnavailable as error:
        return StageResult(facts={"status": "not run", "reason": str(error)})
    signature.write(context.directory)
    run = "validate runs it" if torch.cuda.is_available() else "not run: no NVIDIA GPU"
    return StageResult(
        facts={"status": "built", "reason": "", **dataclasses.asdict(built), "run": run},
        gates=[
            Gate(
                name="convolutions and matrix products are of the precision asked for",
                value=", ".join(f"{number} {name}" for name, number in built.products_by_dtype.items()),
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
    signature = DetectorSignature.read(context.inputs["export"].directory)
    student = loaded_student(context).to(resolve_device(context.recipe.sections["training"].device))
    checkpoint = context.inputs["strip"].path(STUDENT_CHECKPOINT)
    ladder = Ladder(dataset, signature, context, limits)

    ladder.add_reference(student)
    canvas = Floor(points=limits.max_ap_drop_canvas)
    found = (detectron2_on_canvas(student, image) for image in ladder.canvases())
    ladder.add(Rung(name=ON_CANVAS, compared_with=REFERENCE, floors={REFERENCE: canvas}), found, checkpoint)
    graph = detector_graph(student, signature)
    with TorchRunner(graph, signature) as torch_runner:
        floors = {ON_CANVAS: Floor(points=limits.max_ap_drop_graph)}
        rung = Rung(name=GRAPH, compared_with=ON_CANVAS, floors=floors)
        ladder.add(rung, detections_of(torch_runner, ladder.canvases()), checkpoint)
    ladder.match(GRAPH, ON_CANVAS)
    matching, invariance = _add_onnxruntime(ladder, context, signature)
    engine_source = add_precision_rungs(ladder, context, signature)
    providers = add_provider_rungs(ladder, context, signature)
    _add_tensorrt(ladder, context, signature, engine_source)
    add_other_canvases(ladder, context, student)
    head_tensors = {
        ON_CANVAS: detectron2_head_tensors(student, graph),
        GRAPH: graph_head_tensors(graph),
        ONNX_RUNTIME: onnx_head_tensors(context.inputs["export"].path(ONNX_MODEL)),
    }
    differences = head_differences(head_tensors, ladder.canvases(NUM_HEAD_IMAGES))
    for name in (GRAPH, ONNX_RUNTIME):
        ladder.hold(name, _head_gate(name, differences, limits.max_head_error))
    facts = {
        **ladder.facts(),
        "head_tensors": [*differences, *precision_head_differences(context, ladder.canvases(NUM_HEAD_IMAGES))],
        "onnxruntime_providers": providers,
        "matching": dataclasses.asdict(matching),
        "batch_invariance": dataclasses.asdict(invariance),
        "per_class": ladder.per_class(REFERENCE, ONNX_RUNTIME),
    }
    (context.directory / PARITY_FILE).write_text(json.dumps({**facts, "gates": ladder.gates}, indent=1, default=vars))
    return StageResult(facts=facts, gates=ladder.gates)


def _head_gate(name: str, differences: Sequence[HeadDifference], limit: float) -> Gate:
    shares = {
        f"{row.tensor} of level {row.level}": row.max_abs_error / row.max_abs_value if row.max_abs_value else 0.0
        for row in differences
        if row.rung == name
    }
    worst = max(shares, key=lambda tensor: shares[tensor])
    return Gate(
        name=f"head tensors of {name}: largest difference as a share of the largest magnitude",
        value=shares[worst],
        limit=limit,
        passed=shares[worst] <= limit,
        reason=f"{worst}, the worst of {len(shares)}",
    )


def _add_onnxruntime(
    ladder: Ladder, context: StageContext, signature: DetectorSignature
) -> tuple[MatchResult, BatchInvariance]:
    limits, model = context.recipe.sections["parity"], context.inputs["export"].path(ONNX_MODEL)
    floor = Floor(points=limits.max_ap_drop_onnxruntime)
    rung = Rung(name=ONNX_RUNTIME, compared_with=GRAPH, floors={GRAPH: floor, ON_CANVAS: floor})
    with OnnxRuntimeRunner(model, signature) as runner:
        canvases = list(ladder.canvases(limits.num_batch_images))
        invariance = batch_invariance(runner, canvases, score_floor=limits.min_matched_score)
        # What depends on the batch fails for that, and may not run in one: its AP is that of images one by one.
        ladder.add(rung, detections_of(runner, ladder.canvases(), 1 if invariance.failed else None), model)
    matching = ladder.match(ONNX_RUNTIME, ON_CANVAS)
    ladder.hold(ONNX_RUNTIME, batch_gate("ONNX Runtime", invariance))
    return matching, invariance


def _add_tensorrt(ladder: Ladder, context: StageContext, signature: DetectorSignature, source: str) -> None:
    """Add the engine's rung, compared with ``source``: the one that ran the ONNX file it is built from."""
    built, limits = context.inputs["engine"], context.recipe.sections["parity"]
    if built.manifest.facts["status"] != "built":
        ladder.add_not_run(TENSORRT, built.manifest.facts["reason"])
        return
    precision, floor = precision_of(context.inputs), Floor(points=limits.max_ap_drop_tensorrt)
    converted = {ON_CANVAS: floor_of(precision, limits)}
    floors = {source: floor, ON_CANVAS: floor} if precision in AS_EXPORTED else converted
    rung = Rung(name=TENSORRT, compared_with=source, floors=floors)
    try:
        with TensorRTRunner(built.path(ENGINE), signature) as runner:
            ladder.add(rung, detections_of(runner, ladder.canvases()), built.path(ENGINE))
    except EngineUnavailable as error:
        reason = "no NVIDIA GPU" if not torch.cuda.is_available() else str(error)
        ladder.add_not_run(TENSORRT, reason, digest(built.path(ENGINE)))
