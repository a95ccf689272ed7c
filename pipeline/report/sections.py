"""The report's sections: each turns the facts of its stages into plain values, or says why it has none.

A section is a dict with ``status`` ("available" or "not run") and ``reason``, and always has all its keys, so that the
templates never meet an undefined name: a fact that is missing is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.metrics import extra_metrics, metrics_of

Facts = Mapping[str, Any]
Manifests = Mapping[str, Mapping[str, Any]]

NOT_RUN = "not run"
AVAILABLE = "available"
REFERENCE_ROW = "detectron2"
CANVAS_ROW = "torch, fixed canvas"
SPLIT_KEYS = (
    "annotation_file",
    "image_dir",
    "digest",
    "num_images",
    "num_boxes",
    "num_empty_images",
    "num_crowd_boxes",
    "objects_per_image",
    "share_small",
    "num_dropped_boxes",
    "changes",
)
LATENCY_KEYS = (
    "throughput",
    "p50_ms",
    "p90_ms",
    "p95_ms",
    "p99_ms",
    "num_requests",
    "num_failures",
    "mean_batch_size",
    "client_ms",
    "queue_ms",
    "compute_input_ms",
    "compute_infer_ms",
    "compute_output_ms",
)
INVARIANCE_KEYS = ("num_images", "batch_sizes", "mean_batch_size", "num_matched", "num_unmatched", "score_floor")
MAX_FILES = 12  # a generated data set has thousands; the manifest names them all


def pick(facts: Facts | None, keys: Sequence[str]) -> dict[str, Any]:
    """``facts`` reduced to ``keys``, None for each that is missing."""
    return {key: (facts or {}).get(key) for key in keys}


def section(stage: str, manifests: Manifests, absent: Mapping[str, str]) -> tuple[Facts, dict[str, Any]]:
    """The facts of ``stage`` and the head of its section; ``absent`` says why a stage did not run."""
    facts = (manifests.get(stage) or {}).get("facts") or {}
    if stage in absent:
        return facts, {"status": NOT_RUN, "reason": absent[stage]}
    return facts, {"status": AVAILABLE, "reason": None}


def dataset(manifests: Manifests, absent: Mapping[str, str]) -> dict[str, Any]:
    """Size and difficulty of each split."""
    facts, head = section("data", manifests, absent)
    splits = {split: pick(facts[split], SPLIT_KEYS) for split in ("train", "validation") if facts.get(split)}
    return {**head, "embedded": facts.get("embedded"), "class_names": facts.get("class_names") or [], "splits": splits}


def accuracy(manifests: Manifests, absent: Mapping[str, str], gates: Sequence[Facts]) -> dict[str, Any]:
    """Every accuracy row, the reference first, with its distance to the reference and to torch on the same canvas."""
    sources = [(row, stage) for stage in ("validate", "deploy") for row in _facts_rows(manifests, stage)]
    sources.sort(key=lambda source: source[0].get("name") != REFERENCE_ROW)
    sizes = {digest: size for _, digest, size in _all_files(manifests)}
    average_precision = {str(row.get("name")): row.get("AP") for row, _ in sources}
    rows = [_accuracy_row(row, stage, average_precision, sizes, gates) for row, stage in sources]
    _, head = section("validate", manifests, absent)
    if rows:
        head = {"status": AVAILABLE, "reason": None}
    missing = [
        {"stage": stage, "reason": absent[stage]}
        for stage in ("validate", "deploy")
        if rows and stage in absent and not _facts_rows(manifests, stage)
    ]
    extra = extra_metrics(row for row, _ in sources)
    return {**head, "reference": REFERENCE_ROW, "rows": rows, "missing": missing, "extra_metrics": extra}


def _accuracy_row(
    row: Facts, stage: str, average_precision: Facts, sizes: Mapping[str, Any], gates: Sequence[Facts]
) -> dict[str, Any]:
    name, runner = row.get("name"), row.get("runner")
    compared = name not in (REFERENCE_ROW, CANVAS_ROW)  # the canvas row's distance to itself says nothing
    own = row.get("gates") or []
    held = [
        pick(gate, ("name", "value", "limit", "status"))
        for gate in gates
        if gate["stage"] == stage and gate["name"] in own
    ]
    gate_failed = any(gate["status"] == "failed" for gate in held)
    digest = row.get("digest")
    return {
        "name": name,
        "runner": runner,
        "stage": stage,
        "status": "failed" if gate_failed else row.get("status") or NOT_RUN,
        "reason": row.get("reason"),
        **metrics_of(row),
        "delta_to_reference": None
        if name == REFERENCE_ROW
        else difference(row.get("AP"), average_precision.get(REFERENCE_ROW)),
        "delta_to_canvas": difference(row.get("AP"), average_precision.get(CANVAS_ROW)) if compared else None,
        "digest": digest,
        "size_bytes": row.get("size_bytes", sizes.get(str(digest))),
        "command": row.get("command"),
        "gates": held,
    }


def difference(value: Any, base: Any) -> float | None:
    """``value - base`` where both are numbers."""
    if isinstance(value, int | float) and isinstance(base, int | float):
        return value - base
    return None


def strip(manifests: Manifests, absent: Mapping[str, str]) -> dict[str, Any]:
    """What was removed, and the proof that what is left is the student, unchanged."""
    facts, head = section("strip", manifests, absent)
    imported = imported_from(manifests)
    if imported:
        head = {"status": NOT_RUN, "reason": f"trained elsewhere, so there is no teacher; the model is {imported}"}
    exported = (manifests.get("export") or {}).get("facts") or {}
    keys = (
        "num_tensors",
        "tensors_identical",
        "num_teacher_tensors_in_student",
        "max_abs_difference",
        "num_probe_images",
    )
    parts = ("part", "num_parameters", "size_bytes")
    return {
        **head,
        **pick(facts, keys),
        "imported_from": imported,
        "num_teacher_initializers": exported.get("num_teacher_initializers"),
        "kept": pick(facts.get("kept"), parts[1:]),
        "removed": [pick(part, parts) for part in facts.get("removed") or []],
    }


def imported_from(manifests: Manifests) -> str | None:
    """The checkpoint of a model that was trained elsewhere; None for one that the run trained."""
    imported = ((manifests.get("strip") or {}).get("facts") or {}).get("imported_from")
    return f"{imported['checkpoint']}, sha256 {imported['sha256'][:12]}" if imported else None


def onnx_model(manifests: Manifests, absent: Mapping[str, str]) -> dict[str, Any]:
    """Size and shape of the exported graph."""
    facts, head = section("export", manifests, absent)
    keys = ("opset", "num_nodes", "size_bytes", "num_teacher_initializers", "batch_sizes_checked")
    return {**head, **pick(facts, keys)}


def precision(manifests: Manifests, absent: Mapping[str, str]) -> dict[str, Any]:
    """The files in the precision asked for, or that the exported one has it."""
    facts, head = section("precision", manifests, absent)
    keys = ("method", "num_calibration_images", "layers_by_type", "share", "num_float32_nodes", "size_bytes")
    files = [{"name": name, **pick(file, keys)} for name, file in (facts.get("files") or {}).items()]
    return {**head, "precision": facts.get("precision"), "files": files}


def engine(manifests: Manifests, absent: Mapping[str, str]) -> dict[str, Any]:
    """The TensorRT engine, and the architectures it could not be built for, or why there is none."""
    facts, head = section("engine", manifests, absent)
    built = ("library", "version", "precision", "batch_sizes", "gpu", "compute_capabilities", "size_bytes", "seconds")
    keys = (*built, "timing_cache", "inspector", "run")
    by_name = {key: facts.get(key) or {} for key in ("layers_by_dtype", "products_by_dtype", "excluded")}
    return {**head, **pick(facts, keys), **by_name}


def parity(manifests: Manifests, absent: Mapping[str, str]) -> dict[str, Any]:
    """Detection-level matching, batch invariance and golden images."""
    facts, head = section("validate", manifests, absent)
    deployed, _ = section("deploy", manifests, absent)
    keys = ("num_images", "num_matched", "num_unmatched", "min_iou", "max_score_error", "max_box_error_pixels")
    invariance = [
        {"where": where, **{key: values[key] for key in INVARIANCE_KEYS if values.get(key) is not None}}
        for where, values in (
            ("in process", facts.get("batch_invariance")),
            ("live endpoint", deployed.get("batch_invariance")),
        )
        if values
    ]
    return {
        **head,
        "matching": pick(facts["matching"], keys) if facts.get("matching") else None,
        "batch_invariance": invariance,
        "golden_images": deployed.get("golden_images") or None,
    }


def per_class(manifests: Manifests, absent: Mapping[str, str]) -> dict[str, Any]:
    """AP of each class against the reference, largest loss first."""
    facts, head = section("validate", manifests, absent)
    rows = []
    for row in facts.get("per_class") or []:
        values = pick(row, ("name", "reference_AP", "AP"))
        rows.append({**values, "delta": difference(values["AP"], values["reference_AP"])})
    rows.sort(key=lambda row: (row["delta"] is None, row["delta"] or 0.0))
    return {**head, "rows": rows}


def deployment(manifests: Manifests, absent: Mapping[str, str]) -> dict[str, Any]:
    """Where the model version runs, and the container command that was or was not executed."""
    facts, head = section("deploy", manifests, absent)
    keys = ("model_name", "version", "server", "repository", "mean_batch_size", "concurrency")
    container = facts.get("container")
    return {
        **head,
        **pick(facts, keys),
        "container": pick(container, ("command", "executed", "reason")) if container else None,
    }


def latency(manifests: Manifests, absent: Mapping[str, str]) -> dict[str, Any]:
    """Closed loop, open loop and the same model in process, so that the serving overhead is a subtraction."""
    facts, head = section("benchmark", manifests, absent)
    in_process = facts.get("in_process")
    closed = [pick(row, ("concurrency", *LATENCY_KEYS)) for row in facts.get("closed_loop") or []]
    return {
        **head,
        "closed_loop": closed,
        "single": next((row for row in closed if row["concurrency"] == 1), None),
        "open_loop": [pick(row, ("request_rate", *LATENCY_KEYS)) for row in facts.get("open_loop") or []],
        "in_process": pick(in_process, LATENCY_KEYS) if in_process else None,
        "serving_overhead_ms": facts.get("serving_overhead_ms"),
        "objective": dict(facts.get("objective") or {}),
    }


def _facts_rows(manifests: Manifests, stage: str) -> list[Facts]:
    return list(((manifests.get(stage) or {}).get("facts") or {}).get("rows") or [])


def files_of(manifest: Facts) -> list[dict[str, Any]]:
    """Name, digest and size of every file a stage wrote, largest first."""
    files = [
        {"name": name, "digest": record.get("sha256"), "size_bytes": record.get("size_bytes")}
        for name, record in (manifest.get("files") or {}).items()
    ]
    return sorted(files, key=lambda file: -(file["size_bytes"] or 0))


def _all_files(manifests: Manifests) -> list[tuple[str, str, Any]]:
    return [
        (file["name"], str(file["digest"]), file["size_bytes"])
        for manifest in manifests.values()
        for file in files_of(manifest)
    ]
