"""Manifests in, ``report.json`` out: the verdict, the gates, the lineage, and the sections between them."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifact import plain
from pipeline.baseline import Baseline
from pipeline.report import sections
from pipeline.report.distillation import distillation, teacher_panel
from pipeline.report.gallery import GalleryImage, draw_gallery
from pipeline.report.ladder import ladder
from pipeline.report.sections import NOT_RUN, Facts, Manifests

SCHEMA = 1
# What each stage reads; a report does not judge itself, so it is no node.
STAGE_READS: Mapping[str, tuple[str, ...]] = {
    "data": (),
    "train": ("data",),
    "strip": ("train",),
    "export": ("strip",),
    "precision": ("data", "export"),
    "engine": ("export", "precision"),
    "validate": ("data", "strip", "export", "precision", "engine"),
    "deploy": ("export", "precision", "engine", "validate"),
    "benchmark": ("deploy",),
}


def build_report(
    run_dir: Path,
    *,
    manifests: Mapping[str, Mapping[str, Any]],
    failure: Mapping[str, Any] | None,
    recipe_name: str,
    environment: Mapping[str, Any],
    gallery: Sequence[GalleryImage],
    baseline: Baseline | None = None,
    baseline_command: str | None = None,
) -> dict[str, Any]:
    """Everything the report says, as plain JSON values.

    Args:
        run_dir: the run's folder; training curves are read from ``train/metrics.json`` in it, pictures of images that
            changed from the stages that drew them.
        manifests: stage name -> its manifest, for the stages that have one.
        failure: ``stage``, ``type`` and ``message`` of the error that ended the run, or None.
        recipe_name: what the run is called.
        environment: facts about the machine and the versions, nested as it comes.
        gallery: validation images to draw; may be empty.
        baseline: the same training without a distiller, when there is one.
        baseline_command: what trains it.
    """
    gates = _gates(manifests)
    absent = _absent(manifests, failure, gates)
    accuracy = sections.accuracy(manifests, absent, gates)
    data = sections.dataset(manifests, absent)
    report = {
        "schema": SCHEMA,
        "recipe": recipe_name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "verdict": {},
        "headline": {},
        "failure": sections.pick(failure, ("stage", "type", "message")) if failure else None,
        "gates": gates,
        "accuracy": accuracy,
        "ladder": ladder(run_dir, manifests, absent, accuracy["rows"]),
        "distillation": distillation(run_dir, manifests, absent),
        "teacher_panel": teacher_panel(manifests, absent, baseline, baseline_command),
        "dataset": data,
        "strip": sections.strip(manifests, absent),
        "onnx_model": sections.onnx_model(manifests, absent),
        "precision": sections.precision(manifests, absent),
        "engine": sections.engine(manifests, absent),
        "parity": sections.parity(manifests, absent),
        "per_class": sections.per_class(manifests, absent),
        "deployment": sections.deployment(manifests, absent),
        "latency": sections.latency(manifests, absent),
        "gallery": draw_gallery(gallery, data["class_names"]),
        "lineage": [],
        "environment": {
            "machine": _flat({key: value for key, value in environment.items() if key != "versions"}),
            "versions": {
                # The distribution is named only where its name is another one.
                name: str(version).removeprefix(f"{name} ") if version else "not installed"
                for name, version in _flat(environment.get("versions") or {}).items()
            },
        },
        "commands": _commands(manifests, accuracy),
    }
    report["lineage"] = _lineage(manifests, absent, report)
    report["verdict"] = _verdict(report, absent)
    report["headline"] = _headline(report)
    plain_report: dict[str, Any] = plain(report)
    return plain_report


def _gates(manifests: Manifests) -> list[dict[str, Any]]:
    """Every gate of every stage, in stage order, with its status as a word."""
    words = {True: "passed", False: "failed", None: NOT_RUN}
    return [
        {
            "stage": stage,
            **sections.pick(gate, ("name", "value", "limit", "reason")),
            "status": words[gate.get("passed")],
        }
        for stage in STAGE_READS
        for gate in (manifests.get(stage) or {}).get("gates") or []
    ]


def _absent(manifests: Manifests, failure: Facts | None, gates: Sequence[Facts]) -> dict[str, str]:
    """Why each stage that did no work did none: it left no manifest, or one that says that it could not run here."""
    imported = sections.imported_from(manifests)
    stopped_at = [gate["stage"] for gate in gates if gate["status"] == "failed"]
    stopped_at += [failure.get("stage")] if failure else []
    reasons = {}
    for stage in STAGE_READS:
        if stage in manifests:
            facts = manifests[stage].get("facts") or {}
            if facts.get("status") == NOT_RUN:
                reasons[stage] = str(facts.get("reason") or "no reason recorded")
        elif stage == "train" and imported:
            reasons[stage] = f"trained elsewhere; the model is {imported}"
        elif failure and failure.get("stage") == stage:
            reasons[stage] = f"stopped with {failure.get('type')}: {first_line(failure.get('message'))}"
        else:
            reasons[stage] = f"the run stopped at {stopped_at[0]}" if stopped_at else "not part of this run"
    return reasons


def first_line(message: object) -> str:
    """The first line of a message, for a place with room for one sentence."""
    lines = str(message or "").strip().splitlines()
    return lines[0] if lines else "no message"


def _verdict(report: Mapping[str, Any], absent: Mapping[str, str]) -> dict[str, Any]:
    """PASS, FAIL or INCOMPLETE in one sentence, and what was not run with its reason."""
    gates, failure = report["gates"], report["failure"]
    lacking = [stage for stage in absent if not (stage == "train" and report["strip"]["imported_from"])]
    failed = [gate for gate in gates if gate["status"] == "failed"]
    failed_rows = [row for row in report["accuracy"]["rows"] if row["status"] == "failed"]
    passed = sum(gate["status"] == "passed" for gate in gates)
    not_run = _not_run(report, absent)
    if failed:
        word, stage = "FAIL", failed[0]["stage"]
        lossy = report["ladder"]["verdict"]["first_lossy_rung"]
        sentence = _failed_gates(failed) + (f" The first lossy step is {lossy}." if lossy else "")
        if failure and failure["stage"] != stage:
            sentence += f" Stage {failure['stage']} stopped with {failure['type']}: {first_line(failure['message'])}"
    elif failure:
        word, stage = "FAIL", failure["stage"]
        sentence = f"Stage {stage} stopped with {failure['type']}: {first_line(failure['message'])}"
    elif failed_rows:
        word, stage = "FAIL", failed_rows[0]["stage"]
        sentence = f"Accuracy of {failed_rows[0]['name']} failed: {failed_rows[0]['reason'] or 'no reason recorded'}"
    elif lacking:
        word, stage = "INCOMPLETE", None
        sentence = f"All {passed} gates that ran passed, but {_listed(lacking)} did not run"
        reasons = {absent[stage] for stage in lacking}
        sentence += f": {reasons.pop().rstrip('.')}." if len(reasons) == 1 else "."
    else:
        word, stage = "PASS", None
        num_stages = sum(stage["status"] == "passed" for stage in report["lineage"])
        sentence = f"All {passed} gates passed in {num_stages} stages"
        sentence += f"; {len(not_run)} parts were not run." if not_run else "."
    message = str(failure["message"] or "").strip() if failure else ""
    detail = message if len(message.splitlines()) > 1 else None
    return {"status": word, "stage": stage, "sentence": sentence, "detail": detail, "not_run": not_run}


def _failed_gates(failed: Sequence[Facts]) -> str:
    gate = failed[0]
    found, limit = value_text(gate["value"]), value_text(gate["limit"])
    sentence = f"Gate “{gate['name']}” of stage {gate['stage']} failed: {found}, limit {limit}."
    if gate["reason"]:
        sentence += f" {str(gate['reason']).rstrip('.')}."
    if len(failed) > 1:
        sentence += f" {len(failed) - 1} more failed: {_listed([str(other['name']) for other in failed[1:]])}."
    return sentence


def value_text(value: object) -> str:
    """A gate's value or limit for reading: four significant digits, two of a tiny one, words as they are."""
    if value is None:
        return "none"
    if isinstance(value, float):
        text = f"{value:.4g}"
        if value and abs(value) < 1e-3:  # rounding noise: its order of magnitude is what matters
            mantissa, _, exponent = f"{value:.1e}".partition("e")
            text = f"{mantissa}e{int(exponent)}"
        return text.replace("-", "−")
    return str(value)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _not_run(report: Mapping[str, Any], absent: Mapping[str, str]) -> list[dict[str, str]]:
    """Everything this machine or this run did not execute, so that silence is never read as a pass."""
    stopped = report["failure"]["stage"] if report["failure"] else None  # the verdict's sentence is about this one
    found = [(f"stage {stage}", reason) for stage, reason in absent.items() if stage != stopped]
    engine, container = report["engine"], report["deployment"]["container"]
    for part, name in (("inspector", "engine inspector"), ("run", "running the engine")):
        if str(engine[part] or "").startswith(NOT_RUN):
            found.append((name, str(engine[part]).removeprefix(NOT_RUN).lstrip(": ")))
    found += [
        (f"accuracy of {row['name']}", row["reason"]) for row in report["accuracy"]["rows"] if row["status"] == NOT_RUN
    ]
    if container and not container["executed"]:
        found.append(("container command", container["reason"]))
    found += [(f"gate {gate['name']}", gate["reason"]) for gate in report["gates"] if gate["status"] == NOT_RUN]
    return [{"what": what, "reason": reason or "no reason recorded"} for what, reason in found]


def _headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """The few numbers a reader wants first; None where they were not measured."""
    rows = report["accuracy"]["rows"]
    nothing: dict[str, Any] = {}
    reference = next((row for row in rows if row["name"] == report["accuracy"]["reference"]), nothing)
    live = [row for row in rows if row["stage"] == "deploy" and row["AP"] is not None]
    single = report["latency"]["single"] or nothing
    best = max(
        (row for row in report["latency"]["closed_loop"] if row["throughput"]),
        key=lambda row: row["throughput"],
        default=nothing,
    )
    return {
        "reference_AP": reference.get("AP"),
        "reference_AP50": reference.get("AP50"),
        "live_AP": live[-1]["AP"] if live else None,
        "live_name": live[-1]["name"] if live else None,
        "p50_ms": single.get("p50_ms"),
        "p99_ms": single.get("p99_ms"),
        "serving_overhead_ms": report["latency"]["serving_overhead_ms"],
        "throughput": best.get("throughput"),
        "throughput_concurrency": best.get("concurrency"),
        "onnx_size_bytes": report["onnx_model"]["size_bytes"],
        "num_gates": len(report["gates"]),
        "num_gates_passed": sum(gate["status"] == "passed" for gate in report["gates"]),
        "seconds": sum(stage["seconds"] or 0.0 for stage in report["lineage"]),
    }


def _lineage(manifests: Manifests, absent: Mapping[str, str], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    failed = {gate["stage"] for gate in report["gates"] if gate["status"] == "failed"}
    failed |= {report["failure"]["stage"]} if report["failure"] else set()
    stages = []
    for stage, reads in STAGE_READS.items():
        manifest = manifests.get(stage) or {}
        files = sections.files_of(manifest)
        status = "failed" if stage in failed else NOT_RUN if stage in absent else "passed"
        stages.append(
            {
                "stage": stage,
                "reads": list(reads),
                "status": status,
                "reason": absent.get(stage),
                **sections.pick(manifest, ("fingerprint", "seconds", "command")),
                "inputs": _flat(manifest.get("inputs") or {}),
                "files": files[: sections.MAX_FILES],
                "num_files": len(files),
                "manifest": f"../{stage}/manifest.json" if manifest else None,
            }
        )
    return stages


def _commands(manifests: Manifests, accuracy: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What to type to get each stage or accuracy row again, each command once."""
    found = [(f"stage {stage}", (manifests.get(stage) or {}).get("command")) for stage in STAGE_READS]
    found += [(f"row {row['name']}", row["command"]) for row in accuracy["rows"]]
    gives: dict[str, list[str]] = {}
    for what, command in found:
        if command:
            gives.setdefault(str(command), []).append(what)
    return [{"command": command, "gives": what} for command, what in gives.items()]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested facts as dotted names, which is how a table shows them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
