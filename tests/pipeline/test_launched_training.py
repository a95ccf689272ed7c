"""The train stage in several processes: one runner, one artifact, errors as without them, nothing left behind."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from pipeline import launched_training
from pipeline import recipe as recipes
from pipeline.artifact import read_manifest
from pipeline.errors import RecipeError, TrainingProcessLost
from pipeline.run import run_stages
from pipeline.stages import STAGES
from training.divergence import LossNotFinite
from training.launch import LaunchError

ROOT = Path(__file__).resolve().parents[2]
TINY = Path(__file__).with_name("tiny_recipe.py")
TWO = "torchrun --nproc-per-node=2"
QUICK = ("dataset.num_train=4", "dataset.num_validation=2", "training.device=cpu", "training.evaluate_at=[1.0]")


def walk(run_dir: Path, launch: str | None, *overrides: str, until: str = "train") -> str:
    recipe = dataclasses.replace(recipes.load(TINY, [*QUICK, *overrides]), launch=launch)
    output = io.StringIO()
    run_stages(STAGES, recipe, run_dir, until=until, console=Console(file=output, soft_wrap=True))
    return output.getvalue()


@pytest.mark.slow
def test_two_processes_write_the_artifact_that_one_would_and_the_launch_is_a_fact_of_it(tmp_path: Path) -> None:
    walk(tmp_path, TWO, "training.max_iter=2")
    manifest = read_manifest(tmp_path / "train")
    assert (manifest.facts["launch"], manifest.facts["num_processes"]) == (TWO, 2)
    assert {"model_final.pth", "metrics.json", "average_precision.json"} <= set(manifest.files)
    assert f"--launch '{TWO}'" in manifest.command
    assert len(manifest.facts["ap_curve"]) == 1
    assert not (tmp_path / launched_training.FOLDER).exists()
    told = walk(tmp_path, None, "training.max_iter=2", until="strip")
    assert "train: up to date" in told, "where a recipe is trained is no part of its fingerprint"


@pytest.mark.slow
def test_an_error_of_the_processes_is_the_error_of_the_stage(tmp_path: Path) -> None:
    with pytest.raises(LossNotFinite, match=r"^training diverged: \S+ is (nan|inf)"):
        walk(tmp_path, TWO, "training.max_iter=8", "training.learning_rate=1e12", "training.clip_gradient_value=null")
    assert not (tmp_path / "train").exists()


def test_a_launch_that_does_not_fit_is_refused_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launched_training, "_run", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(LaunchError, match="images_per_batch is 2"):
        walk(tmp_path, "torchrun --nproc-per-node=3")


def test_processes_that_end_without_a_word_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched_training, "_run", lambda *_: 137)
    with pytest.raises(TrainingProcessLost, match=r"ended with code 137 .*wanted more memory"):
        walk(tmp_path, TWO)


def test_the_first_process_that_reported_is_believed(tmp_path: Path) -> None:
    for rank, kind in ((10, "pipeline.errors.RecipeError"), (2, "training.divergence.LossNotFinite")):
        report = {"rank": rank, "type": kind, "message": f"of {rank}"}
        (tmp_path / f"error-{rank}.json").write_text(json.dumps(report))
    launch: Any = None
    with pytest.raises(LossNotFinite, match=r"^of 2$"):
        launched_training._raise_reported(tmp_path, launch, 1)


def test_classes_that_are_not_those_of_the_data_set_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.num_classes is 7 and the data set has \d+ classes; leave"):
        walk(tmp_path, None, "model.num_classes=7")


def test_torchrun_around_the_pipeline_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", str(TINY)],
        cwd=ROOT, env={**os.environ, "TORCHELASTIC_RUN_ID": "x"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert '--launch "torchrun --nproc-per-node=8"' in done.stderr


@pytest.mark.slow
def test_processes_end_with_a_runner_that_is_killed(tmp_path: Path) -> None:
    """``kill -9`` of the runner: nothing that it started goes on."""
    command = [
        sys.executable, "-m", "pipeline", "run", str(TINY), *QUICK, "training.max_iter=5000", "--until", "train",
        "--runs", str(tmp_path), "--name", "killed", "--launch", TWO,
    ]  # fmt: skip
    runner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = _wait(lambda: list(tmp_path.glob("killed/train.partial-*/model_*.pth")), seconds=120)
        assert found, "the processes write checkpoints"
        started = psutil.Process(runner.pid).children(recursive=True)
        assert len(started) >= 4, "supervisor, torchrun and two processes"
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        assert _wait(lambda: not any(_lives(process) for process in started), seconds=60)
    finally:
        runner.kill()


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _wait(condition: Any, *, seconds: float) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return found
