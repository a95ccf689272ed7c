"""How a run stands, from what lies in its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from pipeline import publish
from pipeline.artifact import Manifest, open_artifact, read_manifest, size_bytes_of
from pipeline.errors import ArtifactError
from pipeline.identity import FAILURE_KEY, differences, identity_of, read_from
from pipeline.recipe import Recipe
from pipeline.stage import Stage

FAILURE_FILE = "failure.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageStatus:
    """How one stage of a run stands. ``reason`` says why it is not done; the rest comes from the manifest, if any."""

    stage: str
    state: Literal["done", "not run", "stale", "failed gate", "damaged", "partial", "missing"]
    reason: str = ""
    size_bytes: int = 0
    manifest: Manifest | None = None


def status(run_dir: Path, stages: Sequence[Stage], recipe: Recipe | None = None) -> list[StageStatus]:
    """How each stage of a run stands, files verified.

    Args:
        recipe: without it, a change of configuration or of data outside the run goes unnoticed.
    """
    found: dict[str, StageStatus] = {}
    failure = read_failure(run_dir)
    for stage in stages:
        broken = [
            f"{name} is {found[name].state}"
            for name in stage.inputs
            if not stage.always and found[name].state not in ("done", "not run", "failed gate")
        ]
        inputs = {name: known for name in stage.inputs if (known := found[name].manifest)}
        found[stage.name] = _status_of(run_dir, stage, recipe, inputs, broken, failure)
    return list(found.values())


def up_to_date(run_dir: Path, stages: Sequence[Stage], recipe: Recipe) -> bool:
    """Whether a run of the recipe in this folder would build nothing; files are not verified, which the run does."""
    manifests: dict[str, Manifest] = {}
    failure = read_failure(run_dir)
    for stage in stages:
        try:
            manifest = read_manifest(run_dir / stage.name)
        except ArtifactError:
            return False
        config, external = read_from(stage, recipe)
        inputs = {name: manifests[name] for name in stage.inputs}
        if differences(manifest, identity_of(stage, config, external, inputs, failure)):
            return False
        manifests[stage.name] = manifest
    return True


def status_table(
    run_dir: Path, stages: Sequence[Stage], recipe: Recipe | None, *, every_stage: Sequence[Stage]
) -> Table:
    """:func:`status` for a reader; a stage that the run does not have was run elsewhere."""
    table = Table("stage", "state", "seconds", "MB", "why", title=str(run_dir), title_justify="left")
    by_name = {each.stage: each for each in status(run_dir, stages, recipe)}
    for stage in every_stage:
        each = by_name.get(stage.name)
        if each is None:
            table.add_row(stage.name, "not run", "", "", "trained elsewhere")
            continue
        seconds = f"{each.manifest.seconds:.1f}" if each.manifest else ""
        table.add_row(each.stage, each.state, seconds, f"{each.size_bytes / 1e6:.1f}", each.reason)
    return table


def read_failure(run_dir: Path) -> dict[str, Any] | None:
    """The stage that raised in the last run: stage, type, message, traceback, time; None when none did."""
    try:
        return dict(json.loads((run_dir / FAILURE_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _status_of(
    run_dir: Path,
    stage: Stage,
    recipe: Recipe | None,
    inputs: Mapping[str, Manifest],
    broken: Sequence[str],
    failure: Mapping[str, Any] | None,
) -> StageStatus:
    final = run_dir / stage.name
    if not final.exists():
        leftovers = publish.partials(run_dir, stage.name) if stage.resumable else []
        size_bytes = sum(map(size_bytes_of, leftovers))
        return StageStatus(stage=stage.name, state="partial" if leftovers else "missing", size_bytes=size_bytes)
    try:
        manifest = open_artifact(final).manifest
    except ArtifactError as error:
        return StageStatus(stage=stage.name, state="damaged", reason=str(error), size_bytes=size_bytes_of(final))
    if recipe is not None:
        config, external = read_from(stage, recipe)
    else:
        config = manifest.config
        external = {key: value for key, value in manifest.inputs.items() if key not in (*stage.inputs, FAILURE_KEY)}
    reasons = broken or differences(manifest, identity_of(stage, config, external, inputs, failure))
    failed = [gate["name"] for gate in manifest.failed_gates]
    state: Literal["done", "not run", "stale", "failed gate"] = "stale" if reasons else "failed gate"
    if not reasons and not failed:
        state = "not run" if manifest.facts.get("status") == "not run" else "done"
    return StageStatus(
        stage=stage.name,
        state=state,
        reason="; ".join(reasons or failed) or str(manifest.facts.get("reason", "") if state == "not run" else ""),
        size_bytes=manifest.size_bytes,
        manifest=manifest,
    )
