"""How training went, and the panel that says whether the implicit teacher knows more than its student."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.baseline import NO_DISTILLER, Baseline, distiller_name
from pipeline.publish import partials
from pipeline.report.metrics import METRICS, extra_metrics, metrics_of
from pipeline.report.sections import AVAILABLE, NOT_RUN, Facts, Manifests, difference, pick, section

MAX_CURVE_POINTS = 200
TRAINING_FRACTIONS = (0.0, 0.25, 1.0)
FRACTION_TOLERANCE = 0.05
STUDENT, BASELINE, TEACHER = "student", "baseline", "implicit teacher (labels given)"
MEANING = (
    "The implicit teacher's AP is measured through its features with the labels of the validation images given: it is "
    "a sanity check that labels help, never a model that ships."
)


def distillation(run_dir: Path, manifests: Manifests, absent: Mapping[str, str]) -> dict[str, Any]:
    """How training went: AP at fixed shares of it, the AP curve and every loss term."""
    facts, head = section("train", manifests, absent)
    curve = curve_of(facts, "ap_curve")
    marks = [_curve_at(curve, fraction) for fraction in TRAINING_FRACTIONS]
    keys = ("num_iters", "seconds", "images_per_second", "num_parameters", "device", "num_resumed")
    return {
        **head,
        **pick(facts, keys),
        "distiller": _distiller(manifests),
        "ap_curve": curve,
        "ap_at": marks,
        "extra_metrics": extra_metrics(curve),
        "losses": _loss_curves(run_dir),
    }


def teacher_panel(
    manifests: Manifests, absent: Mapping[str, str], baseline: Baseline | None, baseline_command: str | None
) -> dict[str, Any]:
    """AP of student, baseline and implicit teacher at the end of training, on the same images.

    Args:
        baseline: the training without a distiller that this one is compared with, when there is one.
        baseline_command: what trains it, when there is none.
    """
    facts, head = section("train", manifests, absent)
    if head["status"] == AVAILABLE and _distiller(manifests) == NO_DISTILLER:
        head = {"status": NOT_RUN, "reason": "trained without a distiller, so this student is a baseline itself"}
    if head["status"] == NOT_RUN:
        return {**head, "meaning": MEANING, "rows": [], "extra_metrics": []}
    train = manifests["train"]
    of_this_run = {"run": None, **pick(train, ("fingerprint", "command"))}
    student = {"who": STUDENT, **_end(curve_of(facts, "ap_curve")), **of_this_run}
    teacher = {"who": TEACHER, **_end(curve_of(facts, "teacher_ap_curve")), **of_this_run}
    if teacher["status"] == NOT_RUN:
        teacher["reason"] = "this training did not measure it"
    rows = [student, _baseline_row(baseline, baseline_command), teacher]
    for row in rows:
        row["difference_to_student"] = None if row is student else difference(row["AP"], student["AP"])
    return {**head, "meaning": MEANING, "rows": rows, "extra_metrics": extra_metrics(rows)}


def curve_of(facts: Facts, key: str) -> list[dict[str, Any]]:
    """The evaluations of a training, each with all metrics."""
    points = [{**pick(point, ("iteration", "fraction")), **metrics_of(point)} for point in facts.get(key) or []]
    return [point for point in points if isinstance(point["fraction"], int | float)]


def _distiller(manifests: Manifests) -> str | None:
    """By the name that ``distiller=`` takes; the manifest's config knows it best."""
    manifest = manifests.get("train") or {}
    resolved = (manifest.get("config") or {}).get("distiller")
    return distiller_name(resolved) if resolved else (manifest.get("facts") or {}).get("distiller")


def _baseline_row(baseline: Baseline | None, command: str | None) -> dict[str, Any]:
    if baseline is None:
        reason = "no run beside this one trains the same without a distiller; train it, then write this report anew"
        head = {"who": BASELINE, "status": NOT_RUN, "reason": reason, "curve": []}
        return {**head, **metrics_of({}), "run": None, "fingerprint": None, "command": command}
    found = _end(curve_of(baseline.train.facts, "ap_curve"))
    if found["status"] == AVAILABLE and not baseline.same_seed:
        found["reason"] = f"of another seed, {baseline.seed}: the difference includes the spread between seeds"
    return {
        "who": BASELINE,
        **found,
        "run": str(baseline.run_dir),
        "fingerprint": baseline.train.fingerprint,
        "command": baseline.train.command,
    }


def _end(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluation at the end of training with the curve that led to it."""
    last = next((point for point in curve if point["fraction"] == 1.0), None)
    if last is None:
        return {"status": NOT_RUN, "reason": "no evaluation at the end of training", "curve": curve, **metrics_of({})}
    return {"status": AVAILABLE, "reason": None, "curve": curve, **metrics_of(last)}


def _curve_at(curve: Sequence[Facts], fraction: float) -> dict[str, Any]:
    """The evaluation nearest to ``fraction`` of training, or that there was none."""
    near = min(curve, key=lambda point: abs(point["fraction"] - fraction), default=None)
    if near is None or abs(near["fraction"] - fraction) > FRACTION_TOLERANCE:
        reason = f"no evaluation near {fraction:.0%} of training"
        nothing = pick(None, ("iteration", "fraction", *METRICS))
        return {"asked_fraction": fraction, "status": NOT_RUN, "reason": reason, **nothing}
    return {"asked_fraction": fraction, "status": AVAILABLE, "reason": None, **near}


def _loss_curves(run_dir: Path) -> dict[str, list[dict[str, float]]]:
    """Every loss term of detectron2's ``metrics.json`` (JSON lines), thinned to what a chart can show.

    A last line cut short by a crash is dropped: the run that crashed is the one whose curve is wanted.
    """
    logs = [directory / "metrics.json" for directory in (run_dir / "train", *partials(run_dir, "train"))]
    path = next((log for log in logs if log.is_file()), None)
    curves: dict[str, list[dict[str, float]]] = {}
    for line in path.read_text().splitlines() if path else []:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        for key, value in values.items():
            if "loss" in key and "iteration" in values and isinstance(value, int | float):
                curves.setdefault(key, []).append({"iteration": values["iteration"], "value": value})
    return {key: points[:: -(-len(points) // MAX_CURVE_POINTS)] for key, points in sorted(curves.items())}
