"""What decides a stage's result: the object whose fingerprint an artifact carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline import environment
from pipeline.artifact import Manifest, fingerprint
from pipeline.recipe import Recipe
from pipeline.stage import Stage

FAILURE_KEY = "failure"


def read_from(stage: Stage, recipe: Recipe) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The recipe sections a stage declares, and the digests of what it reads from outside the run."""
    return {section: recipe.section_json(section) for section in stage.config_sections}, stage.external_inputs(recipe)


def identity_of(
    stage: Stage,
    config: Mapping[str, Any],
    external: Mapping[str, str],
    inputs: Mapping[str, Manifest],
    failure: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything that decides what the stage writes; its fingerprint is the artifact's.

    Args:
        config, external: see :func:`read_from`.
        inputs: manifests of the artifacts it reads.
        failure: how another stage failed; what a stage that always runs shows depends on it.
    """
    digests = {name: manifest.content_digest for name, manifest in inputs.items()} | dict(external)
    if stage.always and failure and failure.get("stage") != stage.name:
        digests[FAILURE_KEY] = fingerprint([failure.get(key) for key in ("stage", "type", "message")])
    return {
        "stage": stage.name,
        "stage_version": stage.version,
        "config": dict(config),
        "inputs": digests,
        "environment": environment.declared(stage.environment_keys),
    }


def differences(manifest: Manifest, identity: Mapping[str, Any]) -> list[str]:
    """What changed since the manifest was written, in words; empty when nothing did."""
    found = ["changed code of the stage"] if manifest.stage_version != identity["stage_version"] else []
    for kind in ("config", "inputs", "environment"):
        old, new = _flat(getattr(manifest, kind)), _flat(identity[kind])
        keys = [key for key in sorted({*old, *new}) if old.get(key, ...) != new.get(key, ...)]
        told = keys if kind == "inputs" else [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys]
        found += [f"changed {kind}: {', '.join(told[:3])}{' …' if len(told) > 3 else ''}"] if told else []
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by dotted path."""
    if not isinstance(value, dict) or (prefix and not value):
        return {prefix: value}
    children = ((f"{prefix}.{key}".lstrip("."), child) for key, child in value.items())
    return {name: leaf for key, child in children for name, leaf in _flat(child, key).items()}
