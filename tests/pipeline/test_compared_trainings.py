"""Comparing recipes: real trainings, one of which is interrupted and one of which fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import hear_ctrl_c
from rich.console import Console

from pipeline.artifact import read_manifest
from pipeline.compare import compare

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "tests" / "pipeline" / "tiny_recipe.py")
PLAIN = f"{TINY},distiller=none"
QUICK = ("training.evaluate_at=[1.0]", "dataset.num_validation=3")

pytestmark = pytest.mark.slow


def command(runs: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline", "compare", PLAIN, TINY, *QUICK, "--seeds", "2", "--runs", str(runs)]


@pytest.fixture(scope="module")
def interrupted_and_finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A comparison of two recipes with two seeds that heard Ctrl-C in its first training and was started again."""
    runs = tmp_path_factory.mktemp("runs")
    process = subprocess.Popen(command(runs), cwd=ROOT, stdout=subprocess.DEVNULL, preexec_fn=hear_ctrl_c)
    deadline = time.monotonic() + 120
    while not list(runs.glob("compare/*/*/seed-0/train.partial-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    done = subprocess.run(command(runs), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs, done.stdout


def test_an_interrupted_comparison_goes_on_and_every_number_is_that_of_an_artifact(
    interrupted_and_finished: tuple[Path, str],
) -> None:
    runs, output = interrupted_and_finished
    directory = runs / "compare" / "tiny_recipe"
    result = json.loads((directory / "compare.json").read_text())
    assert "tiny_recipe, seed 0: train: goes on where it stopped" in output.replace(",distiller=none", "")
    for row in result["rows"]:
        trainings = [t for t in result["trainings"] if t["contender"] == row["label"]]
        manifests = [read_manifest(Path(t["run"]) / "train") for t in trainings]
        assert [m.fingerprint for m in manifests] == [t["fingerprint"] for t in trainings]
        expected = np.mean([m.facts["ap_curve"][-1]["AP50"] for m in manifests])
        assert row["metrics"]["AP50"]["mean"] == pytest.approx(expected)
        assert row["seconds"]["mean"] == pytest.approx(np.mean([m.facts["seconds"] for m in manifests]))
        assert 200e6 < row["peak_host_memory_bytes"] < 16e9
        assert (row["num_parameters_dropped"] == 0) == (row["distiller"] == "none")
    assert result["rows"][1]["method"]["baseline"] == "tiny_recipe,distiller=none"
    assert (directory / "compare.md").read_text().startswith("# Comparison: tiny_recipe")


def test_the_data_is_made_once_and_shared(interrupted_and_finished: tuple[Path, str]) -> None:
    runs, _ = interrupted_and_finished
    folders = list(runs.glob("compare/tiny_recipe/*/seed-*/data"))
    assert len(folders) == 4
    assert {folder.resolve() for folder in folders} == {*runs.resolve().glob("compare/tiny_recipe/data-*/data")}
    assert len({folder.resolve() for folder in folders}) == 1


def test_equal_seeds_start_from_the_same_student_and_see_the_same_first_batch(
    interrupted_and_finished: tuple[Path, str],
) -> None:
    runs, _ = interrupted_and_finished
    first: dict[str, dict[str, float]] = {}
    for log in runs.glob("compare/tiny_recipe/*/seed-*/train/metrics.json"):
        record = json.loads(log.read_text().splitlines()[0])
        first.setdefault(log.parent.parent.name, {})[log.parents[2].name] = record["loss_cls"]
    assert all(len(losses) == 2 for losses in first.values())
    with_and_without = [list(losses.values()) for _, losses in sorted(first.items())]
    for with_distiller, without in with_and_without:
        assert with_distiller == pytest.approx(without, rel=1e-6)
    assert with_and_without[0][0] != pytest.approx(with_and_without[1][0], rel=1e-6)


def test_what_was_trained_is_not_trained_again_and_a_failure_is_one_row(
    interrupted_and_finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, _ = interrupted_and_finished
    monkeypatch.chdir(ROOT)
    before = {path: path.stat().st_mtime_ns for path in runs.glob("compare/*/*/seed-*/train/manifest.json")}
    arguments = [PLAIN, f"{TINY},training.learning_rate=1e30", *QUICK]
    code = compare(arguments, num_seeds=1, runs=runs, name=None, console=Console(width=200, markup=False))
    assert code == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before
    output = capsys.readouterr().out
    assert "tiny_recipe,distiller=none, seed 0: " not in output  # no process was started for it
    assert "tiny_recipe,training.learning_rate=1e30, seed 0 failed: training diverged" in output
    result = json.loads((runs / "compare" / "tiny_recipe" / "compare.json").read_text())
    assert [row["status"] for row in result["rows"]] == ["finished", "failed"]
    failed = result["trainings"][1]
    assert failed["failure"]["exit_code"] == 3
    assert "training diverged" in (Path(failed["run"]) / "output.txt").read_text()
