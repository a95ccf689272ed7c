"""Stages are frozen, and what decides their result is in their identity."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import fingerprint
from pipeline.identity import differences, identity_of, read_from
from pipeline.recipe import Recipe
from pipeline.stage import Gate, Stage, StageContext, StageResult
from tests.pipeline.test_artifact import write_artifact


def _run(context: StageContext) -> StageResult:
    return StageResult()


STAGE = Stage(name="engine", version=3, inputs=("export",), config_sections=("export",), run=_run)
RECIPE = Recipe(name="toy", path=Path("toy.py"), resolved={"export": {"precision": "fp32"}, "parity": {"limit": 1}})


def _identity(stage: Stage = STAGE, recipe: Recipe = RECIPE, **more: Any) -> dict[str, Any]:
    return identity_of(stage, *read_from(stage, recipe), more.get("inputs", {}), more.get("failure"))


def test_stages_and_gates_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        STAGE.version = 4  # type: ignore[misc]
    gate = Gate(name="AP drop", value=0.1, limit=0.3, passed=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        gate.passed = False  # type: ignore[misc]


def test_only_declared_sections_count() -> None:
    other = dataclasses.replace(RECIPE, resolved={**RECIPE.resolved, "parity": {"limit": 2}})
    assert fingerprint(_identity(recipe=other)) == fingerprint(_identity())
    changed = dataclasses.replace(RECIPE, resolved={**RECIPE.resolved, "export": {"precision": "fp16"}})
    assert fingerprint(_identity(recipe=changed)) != fingerprint(_identity())


@pytest.mark.parametrize(
    "change",
    [
        {"version": 4},
        {"name": "other"},
        {"environment_keys": ("numpy",)},
        {"external_inputs": lambda recipe: {"annotations": "digest"}},
        {"config_sections": ("export", "parity")},
    ],
)
def test_everything_that_a_stage_declares_counts(change: dict[str, Any]) -> None:
    assert fingerprint(_identity(dataclasses.replace(STAGE, **change))) != fingerprint(_identity())


def test_what_an_input_holds_counts(tmp_path: Path) -> None:
    manifest = write_artifact(tmp_path / "export")
    before = fingerprint(_identity(inputs={"export": manifest}))
    rebuilt = dataclasses.replace(manifest, seconds=3.0)
    other = dataclasses.replace(manifest, files={"model.onnx": {"sha256": "0", "size_bytes": 5}})
    assert fingerprint(_identity(inputs={"export": rebuilt})) == before
    assert fingerprint(_identity(inputs={"export": other})) != before


def test_a_failure_counts_only_for_stages_that_always_run() -> None:
    failure = {"stage": "train", "type": "ValueError", "message": "x", "time": "now"}
    assert _identity(failure=failure) == _identity()
    report = dataclasses.replace(STAGE, always=True)
    later = {**failure, "time": "later"}
    assert _identity(report, failure=failure) == _identity(report, failure=later) != _identity(report)


def test_differences_are_told_in_words(tmp_path: Path) -> None:
    identity = _identity()
    manifest = write_artifact(tmp_path / "x", **{key: identity[key] for key in ("stage", "stage_version", "config")})
    manifest = dataclasses.replace(manifest, inputs={}, environment={})
    assert differences(manifest, identity) == []
    changed = dataclasses.replace(RECIPE, resolved={"export": {"precision": "fp16"}})
    newer = _identity(dataclasses.replace(STAGE, version=4), changed, inputs={"export": manifest})
    assert differences(manifest, newer) == [
        "changed code of the stage",
        "changed config: export.precision fp32 -> fp16",
        "changed inputs: export",
    ]
