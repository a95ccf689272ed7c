"""Walk the stages: compare fingerprints, skip or run, publish atomically, lock."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import json
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from rich.console import Console

from pipeline import environment, publish
from pipeline.artifact import Artifact, Manifest, files_in, fingerprint, open_artifact, plain, read_manifest, verify
from pipeline.errors import (
    ArtifactError,
    GateFailed,
    Interrupted,
    NoSpaceLeft,
    RecipeError,
    Terminated,
    is_no_space,
    message_of,
    no_space_message,
)
from pipeline.identity import differences, identity_of, read_from
from pipeline.lock import locked
from pipeline.recipe import Recipe
from pipeline.stage import Gate, Stage, StageContext, StageResult
from pipeline.status import FAILURE_FILE, read_failure


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageOutcome:
    """What the walk did with one stage; ``seconds`` is what it took this time."""

    stage: str
    state: Literal["built", "up to date", "taken as it is"]
    seconds: float
    artifact: Artifact


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What one walk did."""

    run_dir: Path
    outcomes: tuple[StageOutcome, ...]

    @property
    def num_built(self) -> int:
        return sum(outcome.state == "built" for outcome in self.outcomes)


def run_stages(
    stages: Sequence[Stage],
    recipe: Recipe,
    run_dir: Path,
    *,
    console: Console,
    from_stage: str | None = None,
    until: str | None = None,
    force: bool | Set[str] = False,
) -> RunSummary:
    """Bring the artifacts of a run up to date.

    Args:
        stages: in order; each reads only from earlier ones.
        from_stage: start here; the artifacts of earlier stages are taken as they are, whatever the recipe says now.
        until: stop after this stage.
        force: rebuild although nothing changed or something is damaged: every stage walked, or those named.

    Raises:
        GateFailed: a stage's number is outside its limit. The artifact is published, later stages did not run.
        ArtifactError: an artifact is damaged, or one that ``from_stage`` relies on is missing.
        RunLocked: another process works in this folder.
        Interrupted: Ctrl-C or SIGTERM; what can resume is kept.
        NoSpaceLeft: a write failed.
        RecipeError: a name is not a stage.
    """
    earlier, selected = _selected(stages, from_stage, until)
    names = {stage.name for stage in selected}
    forced = (names if force else set()) if isinstance(force, bool) else set(force)
    for name in forced:
        _index(stages, name)
    try:
        with _sigterm_raises(), locked(run_dir, recipe.command):
            for stage in stages:
                publish.recover(run_dir / stage.name)
            return _Walk(recipe, run_dir, forced, console).walk(earlier, selected)
    except KeyboardInterrupt as interrupt:
        error = Terminated if isinstance(interrupt, _Sigterm) else Interrupted
        raise error(
            f"{run_dir}: stopped; the same command goes on from the last finished stage or checkpoint"
        ) from None


class _Sigterm(KeyboardInterrupt):
    """SIGTERM arrived; like Ctrl-C it has to pass through every ``except Exception`` of the stages."""


class _Walk:
    """The state of one walk over the stages."""

    def __init__(self, recipe: Recipe, run_dir: Path, forced: Set[str], console: Console) -> None:
        self.recipe = recipe
        self.run_dir = run_dir
        self.forced = forced
        self.console = console
        self.artifacts: dict[str, Artifact] = {}
        self.outcomes: list[StageOutcome] = []

    def walk(self, earlier: Sequence[Stage], selected: Sequence[Stage]) -> RunSummary:
        failure: Exception | None = None
        for stage in earlier:
            directory = self.run_dir / stage.name
            if directory.exists():
                found = self._finish(stage, "taken as it is", open_artifact(directory), 0.0)
                failure = failure or found
        for stage in selected:
            if failure is not None and not (stage.always and self.artifacts):
                continue
            try:
                found = self._visit(stage)
                failure = failure or found
            except Exception as error:
                if failure is not None:  # the first failure is the one to raise
                    self._say(f"{stage.name}: {message_of(error)}")
                    continue
                failure = self._no_space_named(stage, error)
                self._write_failure(stage, failure)
        if failure is not None:
            raise failure
        return RunSummary(run_dir=self.run_dir, outcomes=tuple(self.outcomes))

    def _visit(self, stage: Stage) -> GateFailed | None:
        """Skip or build one stage."""
        started = time.monotonic()
        inputs = self._inputs(stage)
        manifests = {name: artifact.manifest for name, artifact in inputs.items()}
        config, external = read_from(stage, self.recipe)
        identity = identity_of(stage, config, external, manifests, read_failure(self.run_dir))
        mark = fingerprint(identity)
        final = self.run_dir / stage.name
        partial = publish.partial_directory(self.run_dir, stage.name, mark)
        why = "forced"
        if stage.name not in self.forced:
            why = "not built yet"
            if final.exists():
                manifest = read_manifest(final)
                if manifest.fingerprint == mark:
                    verify(final, manifest)
                    publish.discard_partials(self.run_dir, stage.name)
                    artifact = Artifact(directory=final, manifest=manifest)
                    return self._finish(stage, "up to date", artifact, time.monotonic() - started)
                why = "; ".join(differences(manifest, identity))
        goes_on = stage.resumable and stage.name not in self.forced
        publish.discard_partials(self.run_dir, stage.name, keep=partial if goes_on else None)
        self._say(f"{stage.name}: {'goes on where it stopped' if partial.exists() else 'running'} ({why})")
        artifact = self._build(stage, identity, inputs, partial)
        return self._finish(stage, "built", artifact, time.monotonic() - started)

    def _inputs(self, stage: Stage) -> dict[str, Artifact]:
        missing = [name for name in stage.inputs if name not in self.artifacts]
        if missing and not stage.always:
            raise ArtifactError(
                f"artifact missing: stage {stage.name} reads {', '.join(missing)}, which {self.run_dir} does not hold. "
                "Run without --from, or from that stage."
            )
        return {name: self.artifacts[name] for name in stage.inputs if name not in missing}

    def _build(self, stage: Stage, identity: dict[str, Any], inputs: Mapping[str, Artifact], partial: Path) -> Artifact:
        """Run the stage in its partial directory and publish what it wrote."""
        partial.mkdir(parents=True, exist_ok=True)
        command = f"{self.recipe.command} --until {stage.name}"
        context = StageContext(
            directory=partial, run_dir=self.run_dir, recipe=self.recipe, inputs=inputs, console=self.console,
            command=command,
        )  # fmt: skip
        started, clock = _now(), time.monotonic()
        try:
            result = stage.run(context)
            manifest = Manifest(
                **identity,
                fingerprint=fingerprint(identity), files=files_in(partial), machine=environment.facts(),
                facts=_facts(result, partial), gates=plain(list(result.gates)), command=command,
                seconds=time.monotonic() - clock, started=started, finished=_now(),
            )  # fmt: skip
            manifest.write(partial)
        except BaseException:
            if not stage.resumable:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        final = self.run_dir / stage.name
        publish.publish(partial, final)
        return Artifact(directory=final, manifest=manifest)

    def _finish(
        self, stage: Stage, state: Literal["built", "up to date", "taken as it is"], artifact: Artifact, seconds: float
    ) -> GateFailed | None:
        """Record a stage whose artifact is there; the result is what its failed gates ask to raise."""
        self.artifacts[stage.name] = artifact
        self.outcomes.append(StageOutcome(stage=stage.name, state=state, seconds=seconds, artifact=artifact))
        failure = read_failure(self.run_dir)
        if failure and failure.get("stage") == stage.name and state != "taken as it is":
            (self.run_dir / FAILURE_FILE).unlink(missing_ok=True)
        gates = [Gate(**gate) for gate in artifact.manifest.failed_gates]
        verdict = f", {len(gates)} failed gate{'s' if len(gates) > 1 else ''}" if gates else ""
        if artifact.manifest.facts.get("status") == "not run":
            verdict = f", not run: {artifact.manifest.facts.get('reason')}"
        self._say(f"{stage.name}: {state}, {artifact.manifest.size_bytes / 1e6:.1f} MB, {seconds:.1f} s{verdict}")
        return GateFailed(stage.name, gates) if gates else None

    def _no_space_named(self, stage: Stage, error: Exception) -> Exception:
        """Writers that found no space left often do not say where; the stage's folder is the least to tell."""
        if not is_no_space(error) or isinstance(error, NoSpaceLeft):
            return error
        named = NoSpaceLeft(f"stage {stage.name}: {no_space_message(error, self.run_dir / stage.name)}")
        named.__cause__ = error
        return named

    def _write_failure(self, stage: Stage, error: Exception) -> None:
        content = {
            "stage": stage.name,
            "type": type(error).__name__,
            "message": message_of(error),
            "traceback": "".join(traceback.format_exception(error)),
            "time": _now(),
        }
        with contextlib.suppress(OSError):  # on a full disk the error itself is what counts
            (self.run_dir / FAILURE_FILE).write_text(json.dumps(content, indent=1) + "\n")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _selected(stages: Sequence[Stage], first: str | None, last: str | None) -> tuple[list[Stage], list[Stage]]:
    """The stages before the first to walk, and those to walk."""
    begin = 0 if first is None else _index(stages, first)
    end = len(stages) if last is None else _index(stages, last) + 1
    if end <= begin:
        raise RecipeError(f"nothing to run: stage {last} (--until) comes before stage {first} (--from)")
    return list(stages[:begin]), list(stages[begin:end])


def _index(stages: Sequence[Stage], name: str) -> int:
    names = [stage.name for stage in stages]
    if name in names:
        return names.index(name)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise RecipeError(f"no stage {name!r}: {hint}The stages are {', '.join(names)}.")


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, so that locks are released and servers stopped on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker: end as it would without us
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise _Sigterm

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _facts(result: StageResult, partial: Path) -> dict[str, Any]:
    """The facts as JSON. A path into the partial directory would be wrong after the rename, so it is refused."""
    facts = plain(result.facts)
    if partial.name in json.dumps(facts):
        raise ValueError(
            f"facts name {partial.name}, which is about to be renamed; give paths relative to the artifact"
        )
    return dict(facts)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
