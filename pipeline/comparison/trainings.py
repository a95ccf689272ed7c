"""Run the trainings of a comparison, each in a process of its own: its peak memory is its own, and so is its crash.

A training's process leads its own session, so that Ctrl-C reaches it once, through :func:`train_in_process`. It also
ends when the comparison is killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import publish
from pipeline.artifact import Manifest, open_artifact
from pipeline.comparison.plan import DATA_STAGE, Contender, Plan
from pipeline.errors import exit_code_of, message_of
from pipeline.recipe import Recipe
from pipeline.run import run_stages
from pipeline.stages import STAGES
from pipeline.status import status
from serving.servers import supervise

UNTIL = "strip"
PEAK_MEMORY_FILE = "peak_memory.json"
OUTPUT_FILE = "output.txt"
END_SECONDS = 60.0  # for a training that was told to stop, before it is killed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a training has no result; ``exit_code`` as ``pipeline.errors`` draws them, 1 for a crash."""

    reason: str
    exit_code: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One contender with one seed: its artifacts, or its failure.

    Attributes:
        command: of the ordinary pipeline, to get the same artifacts again.
        peak_host_memory_bytes: resident memory of the training's process, its loader workers not counted; None where
            it was killed before it could tell, and for a training in several processes.
        peak_gpu_memory_bytes: what torch allocated on its GPU; None without one.
    """

    contender: str
    seed: int
    run_dir: Path
    command: str
    failure: Failure | None = None
    train: Manifest | None = None
    strip: Manifest | None = None
    peak_host_memory_bytes: int | None = None
    peak_gpu_memory_bytes: int | None = None


def prepare_data(plan: Plan, console: Console) -> None:
    """Generate or check the data set once, for all trainings.

    Raises:
        DatasetError and whatever else the data stage raises.
    """
    recipe = _at(plan.contenders[0].recipe, plan.data_dir)
    run_stages(STAGES, recipe, plan.data_dir, until=DATA_STAGE, console=console)


def done_training(plan: Plan, contender: Contender, seed: int, console: Console) -> Training:
    """Bring one training up to date; a finished one is only verified, an interrupted one goes on.

    A failure is part of the result. Only Ctrl-C is raised, after the training's process has ended.
    """
    run_dir = plan.run_dir(contender, seed)
    recipe = _at(contender.seeded(seed), run_dir)
    command = f"{recipe.command} --until {UNTIL}"
    failure = None
    try:
        _link(run_dir / DATA_STAGE, plan.data_dir / DATA_STAGE)
        stages = STAGES[: [stage.name for stage in STAGES].index(UNTIL) + 1]
        if any(stage.state != "done" for stage in status(run_dir, stages, recipe)):
            failure = _run(contender, seed, recipe, run_dir, console)
        manifests = {name: open_artifact(run_dir / name).manifest for name in ("train", UNTIL)} if not failure else {}
    except Exception as error:  # of this training alone: a damaged artifact, a full disk
        failure = Failure(reason=message_of(error), exit_code=exit_code_of(error) or 1)
        manifests = {}
    peak = _peak_memory(run_dir)
    return Training(
        contender=contender.label, seed=seed, run_dir=run_dir, command=command, failure=failure,
        train=manifests.get("train"), strip=manifests.get(UNTIL),
        peak_host_memory_bytes=peak.get("host_bytes"), peak_gpu_memory_bytes=peak.get("gpu_bytes"),
    )  # fmt: skip


def _at(recipe: Recipe, run_dir: Path) -> Recipe:
    """The recipe with the command line's options for its run folder."""
    return dataclasses.replace(recipe, options=("--runs", str(run_dir.parent), "--name", run_dir.name))


def _link(link: Path, target: Path) -> None:
    """Let a run folder share a data artifact; a link that points elsewhere is replaced."""
    link.parent.mkdir(parents=True, exist_ok=True)
    relative = os.path.relpath(target, link.parent)
    if link.is_symlink() and os.readlink(link) != relative:
        link.unlink()
    if not link.is_symlink() and not link.exists():
        link.symlink_to(relative, target_is_directory=True)


def _run(contender: Contender, seed: int, recipe: Recipe, run_dir: Path, console: Console) -> Failure | None:
    """Start the training's process and pass on what it says; the last thing it says is why it failed."""
    command = [sys.executable, "-u", "-m", "pipeline", "compare-training", contender.given, *recipe.overrides]
    command += [*recipe.options, *(("--launch", recipe.launch) if recipe.launch else ())]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    last = ""
    try:
        assert process.stdout is not None
        with (run_dir / OUTPUT_FILE).open("a") as output:
            output.write(f"$ {shlex.join(command)}\n")
            for line in process.stdout:
                output.write(line)
                output.flush()
                last = line.strip() or last
                console.print(f"  {contender.label}, seed {seed}: {line.rstrip()}", markup=False, highlight=False)
        code = process.wait()
    except BaseException:
        _end(process)
        raise
    if code == 0:
        return None
    if code < 0:
        memory = ", which often means that memory ran out" if -code == signal.SIGKILL else ""
        return Failure(reason=f"its process was killed by {signal.Signals(-code).name}{memory}", exit_code=1)
    return Failure(reason=last or f"ended with exit code {code} and said nothing", exit_code=code)


def _end(process: subprocess.Popen[str]) -> None:
    """Stop a training as SIGTERM does, which keeps its checkpoints."""
    process.terminate()
    try:
        process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def train_in_process(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """The body of a training's process: data, train and strip, and the peak memory up to the end of training.

    Raises:
        whatever the stages raise.
    """
    supervise.die_with_parent(signal.SIGTERM)
    before = _peak_memory(run_dir) if publish.partials(run_dir, "train") else {}
    built = True
    try:
        summary = run_stages(STAGES, recipe, run_dir, until="train", console=console)
        built = any(outcome.stage == "train" and outcome.state == "built" for outcome in summary.outcomes)
    finally:
        if built and recipe.launch is None:  # else the training's processes are not this one
            _record_peak_memory(run_dir, before)
    run_stages(STAGES, recipe, run_dir, from_stage=UNTIL, until=UNTIL, console=console)


def _record_peak_memory(run_dir: Path, before: dict[str, Any]) -> None:
    import torch

    # Not getrusage: its maximum begins with the memory of the process that this one was started from.
    lines = Path("/proc/self/status").read_text().splitlines()
    host = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
    found = {"host_bytes": host, "gpu_bytes": gpu}
    peak = {
        key: max((v for v in (value, before.get(key)) if v is not None), default=None) for key, value in found.items()
    }
    (run_dir / PEAK_MEMORY_FILE).write_text(json.dumps(peak))


def _peak_memory(run_dir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run_dir / PEAK_MEMORY_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return {}
