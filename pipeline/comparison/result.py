"""Trainings → ``compare.json``: one row a contender, every number with the run folders and artifacts it comes from."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.artifact import Manifest, plain
from pipeline.baseline import NO_DISTILLER, distiller_name
from pipeline.comparison.paired import CONFIDENCE, Summary, paired_difference, summary
from pipeline.comparison.plan import Contender, Plan, training_sections
from pipeline.comparison.trainings import Training
from pipeline.report.metrics import extra_metrics, metrics_of

SCHEMA = 1
MACHINE_KEYS = ("cpu", "num_cores", "gpus", "platform")


def comparison_result(
    plan: Plan, trainings: Sequence[Training], *, data: Manifest, machine: Mapping[str, Any], command: str
) -> dict[str, Any]:
    """Everything the tables say, as plain JSON values.

    Args:
        trainings: all of them, failed ones too.
        data: of the artifact that all trainings read.
        machine: facts about this machine, for the versions; each training names the machine it ran on.
        command: what was typed.
    """
    by_contender = {c.label: [t for t in trainings if t.contender == c.label] for c in plan.contenders}
    first = plan.contenders[0].label
    rows = [_row(contender, by_contender[contender.label], by_contender[first]) for contender in plan.contenders]
    for row, contender in zip(rows, plan.contenders, strict=True):
        row["method"] = _method_share(contender, plan.contenders, by_contender)
    finished = [training for training in trainings if training.failure is None]
    machines = [{key: t.train.machine.get(key) for key in MACHINE_KEYS} for t in finished if t.train]
    splits = {split: data.facts.get(split) or {} for split in ("train", "validation")}
    result: dict[str, Any] = plain(
        {
            "schema": SCHEMA,
            "name": plan.name,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
            "first": first,
            "num_seeds": plan.num_seeds,
            "confidence": CONFIDENCE,
            "dataset": {name: {key: of.get(key) for key in ("num_images", "digest")} for name, of in splits.items()},
            "extra_metrics": extra_metrics(final_point(_facts(training)) or {} for training in finished),
            "rows": rows,
            "trainings": [_training(training) for training in trainings],
            "machines": [m for index, m in enumerate(machines) if m not in machines[:index]],
            "versions": machine.get("versions") or {},
            "commit": machine.get("commit"),
        }
    )
    return result


def final_point(facts: Mapping[str, Any], curve: str = "ap_curve") -> dict[str, Any] | None:
    """The evaluation at the end of training; None where that curve has none."""
    return next((dict(point) for point in facts.get(curve) or [] if point["fraction"] == 1.0), None)


def _row(contender: Contender, trainings: Sequence[Training], first: Sequence[Training]) -> dict[str, Any]:
    finished = [training for training in trainings if training.failure is None]
    facts = {training.seed: _facts(training) for training in finished}
    points = {seed: metrics_of(final_point(of) or {}) for seed, of in facts.items()}
    teachers = {seed: metrics_of(final_point(of, "teacher_ap_curve") or {}) for seed, of in facts.items()}
    base = {
        training.seed: metrics_of(final_point(_facts(training)) or {}) for training in first if not training.failure
    }
    status = {0: "failed", len(trainings): "finished"}.get(len(finished), "incomplete")
    return {
        "label": contender.label,
        "recipe": contender.given,
        "overrides": contender.recipe.overrides,
        "distiller": distiller_name(contender.recipe.section_json("distiller")),
        "status": status,
        "num_finished": len(finished),
        "metrics": _summaries(points),
        "teacher_metrics": _summaries(teachers),
        "difference_to_first": None
        if trainings == first
        else paired_difference(_values(points, "AP"), _values(base, "AP")),
        **{key: summary(list(_values(facts, key).values())) for key in ("seconds", "images_per_second")},
        "peak_host_memory_bytes": max((t.peak_host_memory_bytes or 0 for t in finished), default=0) or None,
        "peak_gpu_memory_bytes": max((t.peak_gpu_memory_bytes or 0 for t in finished), default=0) or None,
        "num_parameters_student": _parameters(finished, "kept"),
        "num_parameters_dropped": _parameters(finished, "removed"),
    }


def _method_share(
    contender: Contender, contenders: Sequence[Contender], by_contender: Mapping[str, Sequence[Training]]
) -> dict[str, Any] | None:
    """What the method adds to a training step, over the contender that differs in the distiller alone and has none.

    From images a second, which leaves out evaluations. None where no such contender was trained.
    """
    baseline = next(
        (
            other
            for other in contenders
            if other.label != contender.label
            and training_sections(other.recipe, "distiller") == training_sections(contender.recipe, "distiller")
            and distiller_name(other.recipe.section_json("distiller")) == NO_DISTILLER
        ),
        None,
    )
    if baseline is None:
        return None
    steps, base = (
        {
            training.seed: contender.recipe.sections["training"].images_per_batch / rate
            for training in by_contender[label]
            if (rate := _facts(training).get("images_per_second"))
        }
        for label in (contender.label, baseline.label)
    )
    shared = sorted(steps.keys() & base.keys())
    difference = paired_difference(steps, base)
    if difference is None:
        return None
    ratio = summary([steps[seed] / base[seed] for seed in shared])
    assert ratio is not None
    return {
        "baseline": baseline.label,
        "step_ratio": ratio,
        "seconds_per_step": difference,
        "share": 1 - 1 / ratio.mean,
        "seconds": difference.mean * contender.recipe.sections["training"].max_iter,
    }


def _training(training: Training) -> dict[str, Any]:
    facts, train, strip = _facts(training), training.train, training.strip
    return {
        "contender": training.contender,
        "seed": training.seed,
        "status": "failed" if training.failure else "finished",
        "failure": dataclasses.asdict(training.failure) if training.failure else None,
        "run": str(training.run_dir),
        "command": training.command,
        "fingerprint": train.fingerprint if train else None,
        "student_sha256": strip.files.get("student.pth", {}).get("sha256") if strip else None,
        "machine": {key: train.machine.get(key) for key in MACHINE_KEYS} if train else None,
        "commit": train.machine.get("commit") if train else None,
        "metrics": metrics_of(final_point(facts) or {}),
        "teacher_metrics": metrics_of(final_point(facts, "teacher_ap_curve") or {}),
        "ap_curve": facts.get("ap_curve") or [],
        "teacher_ap_curve": facts.get("teacher_ap_curve") or [],
        **{key: facts.get(key) for key in ("device", "num_iters", "num_resumed", "seconds", "images_per_second")},
        "peak_host_memory_bytes": training.peak_host_memory_bytes,
        "peak_gpu_memory_bytes": training.peak_gpu_memory_bytes,
    }


def _facts(training: Training) -> Mapping[str, Any]:
    return training.train.facts if training.train else {}


def _summaries(points: Mapping[int, Mapping[str, Any]]) -> dict[str, Summary]:
    """Mean and spread of each metric that any seed has."""
    keys = dict.fromkeys(key for point in points.values() for key in point)
    found = {key: summary(list(_values(points, key).values())) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def _values(by_seed: Mapping[int, Mapping[str, Any]], key: str) -> dict[int, float]:
    """The number of each seed that has one."""
    return {seed: of[key] for seed, of in sorted(by_seed.items()) if isinstance(of.get(key), int | float)}


def _parameters(finished: Sequence[Training], key: str) -> int | None:
    """Number of parameters that strip kept or removed: the same for every seed."""
    for training in finished:
        found = training.strip.facts.get(key) if training.strip else None
        if found is not None:
            return sum(part["num_parameters"] for part in ([found] if isinstance(found, dict) else found))
    return None
