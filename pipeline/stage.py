"""What a stage is: read artifacts, call one package, write an artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.artifact import Artifact
from pipeline.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """A threshold that stops the run.

    Attributes:
        value, limit: what was found and what is allowed, in the unit the name says.
        reason: where to look when it failed, or why the limit is what it is; may be empty.
    """

    name: str
    value: float | int | str | bool | None
    limit: float | int | str | bool | None
    passed: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a stage is given.

    Attributes:
        directory: write here. It becomes ``run_dir/<stage>`` by a rename when the stage returns, so facts and files
            hold paths relative to it. A resumable stage finds its own earlier files in it.
        run_dir: folder of the whole run; ``failure.json`` in it describes the stage that raised, if one did.
        inputs: verified artifacts by stage name. A stage that always runs gets those that are there.
        command: the command that reproduces this artifact.
    """

    directory: Path
    run_dir: Path
    recipe: Recipe
    inputs: Mapping[str, Artifact]
    console: Console
    command: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage found out; facts are dataclasses or plain JSON values."""

    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gates: tuple[Gate, ...] | list[Gate] = ()


def no_external_inputs(recipe: Recipe) -> Mapping[str, str]:
    """For stages that read only the recipe and other stages' artifacts."""
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the pipeline. All but ``run``, ``always`` and ``resumable`` is part of the fingerprint.

    Attributes:
        version: count up when the code of the stage changes what it writes.
        inputs: names of the stages whose artifacts it reads.
        config_sections: recipe sections it depends on.
        environment_keys: keys of :func:`pipeline.environment.declared` it depends on.
        external_inputs: digests of what it reads from outside the run, by name; cheap, called on every run.
        always: runs also after a failed gate or a failed stage, with the inputs that are there.
        resumable: an interrupted run's partial directory is kept for the next one.
    """

    name: str
    version: int
    inputs: tuple[str, ...]
    config_sections: tuple[str, ...]
    run: Callable[[StageContext], StageResult]
    environment_keys: tuple[str, ...] = ()
    external_inputs: Callable[[Recipe], Mapping[str, str]] = no_external_inputs
    always: bool = False
    resumable: bool = False
