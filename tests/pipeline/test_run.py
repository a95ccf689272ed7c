"""Walking toy stages: skip, rebuild, publish, gates, failures, interrupts, two runs at once."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import hear_ctrl_c
from rich.console import Console

from pipeline.artifact import Artifact, open_artifact
from pipeline.errors import ArtifactError, GateFailed, Interrupted, RecipeError, RunLocked
from pipeline.recipe import Recipe
from pipeline.run import RunSummary, run_stages
from pipeline.stage import Gate, Stage, StageContext, StageResult
from pipeline.status import read_failure, status, up_to_date

ROOT = Path(__file__).resolve().parents[2]


class Toy:
    """Four stages (data, train, check, report) that write small files and count how often they ran."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.ran: list[str] = []
        self.texts = {"data": "pixels", "train": "weights", "check": "numbers"}
        self.config: dict[str, Any] = {"dataset": {"seed": 0}, "training": {"num_iters": 10}, "parity": {"limit": 1}}
        self.external = "outside"
        self.gate_passes = True
        self.raises: dict[str, BaseException] = {}
        self.reported: dict[str, Artifact] = {}
        self.output = io.StringIO()
        self.stages = (
            self._stage("data", (), "dataset", external_inputs=lambda recipe: {"annotations": self.external}),
            self._stage("train", ("data",), "training", resumable=True),
            self._stage("check", ("data", "train"), "parity"),
            Stage(
                name="report",
                version=1,
                inputs=("data", "train", "check"),
                config_sections=(),
                always=True,
                run=self._report,
            ),
        )

    def _stage(self, name: str, inputs: tuple[str, ...], section: str, **more: Any) -> Stage:
        def run(context: StageContext) -> StageResult:
            self.ran.append(name)
            (context.directory / "files").mkdir(exist_ok=True)
            (context.directory / "files" / "out.txt").write_text(self.texts[name])
            if name in self.raises:
                raise self.raises[name]
            gates = [Gate(name="toy AP", value=1.5, limit=1, passed=self.gate_passes)] if name == "check" else []
            return StageResult(facts={"length": len(self.texts[name])}, gates=gates)

        return Stage(name=name, version=1, inputs=inputs, config_sections=(section,), run=run, **more)

    def _report(self, context: StageContext) -> StageResult:
        self.ran.append("report")
        self.reported = dict(context.inputs)
        (context.directory / "report.md").write_text(str(sorted(context.inputs)))
        return StageResult()

    @property
    def recipe(self) -> Recipe:
        return Recipe(name="toy", path=Path("toy.py"), resolved=self.config)

    def run(self, **options: Any) -> RunSummary:
        self.ran.clear()
        console = Console(file=self.output, width=200)
        return run_stages(self.stages, self.recipe, self.run_dir, console=console, **options)

    def states(self, *, with_recipe: bool = True) -> list[str]:
        return [entry.state for entry in status(self.run_dir, self.stages, self.recipe if with_recipe else None)]


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "runs" / "toy")


def test_a_run_is_up_to_date_when_no_stage_would_be_built(toy: Toy) -> None:
    def is_up_to_date() -> bool:
        return up_to_date(toy.run_dir, toy.stages, toy.recipe)

    assert not is_up_to_date()
    toy.run(until="check")
    assert not is_up_to_date(), "the report is missing"
    toy.run()
    assert is_up_to_date()
    toy.config["parity"] = {"limit": 2}
    assert not is_up_to_date()
    toy.gate_passes = False
    with pytest.raises(GateFailed):
        toy.run()
    assert is_up_to_date(), "a failed gate is not measured again"
    toy.external = "other annotations"
    assert not is_up_to_date()
    toy.external = "outside"
    (toy.run_dir / "train" / "manifest.json").write_text("{}")
    assert not is_up_to_date()


def test_a_second_call_runs_nothing(toy: Toy) -> None:
    assert toy.run().num_built == 4
    assert toy.ran == ["data", "train", "check", "report"]
    started = time.monotonic()
    summary = toy.run()
    assert toy.ran == []
    assert [outcome.state for outcome in summary.outcomes] == ["up to date"] * 4
    assert time.monotonic() - started < 1
    assert toy.states() == ["done"] * 4
    assert toy.states(with_recipe=False) == ["done"] * 4


def test_a_changed_section_rebuilds_its_stage_and_what_depends_on_it(toy: Toy) -> None:
    toy.run()
    toy.config["training"] = {"num_iters": 20}
    assert toy.states() == ["done", "stale", "stale", "done"]
    toy.run()
    assert toy.ran == ["train", "check", "report"]
    assert "config: training.num_iters 10 -> 20" in toy.output.getvalue()


def test_changed_data_outside_the_run_rebuilds(toy: Toy) -> None:
    toy.run()
    toy.external = "changed"
    assert toy.states()[0] == "stale"
    toy.run()
    assert toy.ran == ["data", "train", "check", "report"]


def test_a_rebuilt_but_identical_artifact_leaves_what_follows_up_to_date(toy: Toy) -> None:
    toy.run()
    before = open_artifact(toy.run_dir / "data").manifest
    toy.run(force={"data"})
    after = open_artifact(toy.run_dir / "data").manifest
    assert toy.ran == ["data"]
    assert after.content_digest == before.content_digest
    toy.texts["data"] = "other pixels"
    toy.run(force={"data"})
    assert toy.ran == ["data", "train", "check", "report"]


def test_a_new_stage_version_rebuilds(toy: Toy) -> None:
    toy.run()
    import dataclasses

    toy.stages = (dataclasses.replace(toy.stages[0], version=2), *toy.stages[1:])
    toy.run()
    assert toy.ran[0] == "data"


@pytest.mark.parametrize("stage", ["data", "train", "check", "report"])
def test_a_flipped_byte_is_named_and_only_force_rebuilds(toy: Toy, stage: str) -> None:
    toy.run()
    file = next(
        path for path in sorted((toy.run_dir / stage).rglob("*")) if path.is_file() and path.name != "manifest.json"
    )
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=str(file)) as caught:
        toy.run()
    assert caught.value.exit_code == 5
    assert stage not in toy.ran
    assert "damaged" in toy.states()
    toy.run(force={stage})
    assert stage in toy.ran
    assert toy.states() == ["done"] * 4


def test_a_truncated_manifest_is_damage(toy: Toy) -> None:
    toy.run()
    manifest = toy.run_dir / "train" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"train/manifest\.json is not JSON"):
        toy.run()
    toy.run(force=True)
    assert toy.states() == ["done"] * 4


def test_until_stops_after_a_stage_and_from_takes_earlier_ones_as_they_are(toy: Toy) -> None:
    toy.run(until="train")
    assert toy.ran == ["data", "train"]
    toy.config["dataset"] = {"seed": 1}
    summary = toy.run(from_stage="check")
    assert toy.ran == ["check", "report"]
    assert [outcome.state for outcome in summary.outcomes] == ["taken as it is"] * 2 + ["built"] * 2
    toy.run(from_stage="train", until="train", force=True)
    assert toy.ran == ["train"]


def test_from_needs_what_the_stage_reads(toy: Toy) -> None:
    with pytest.raises(ArtifactError, match="reads data, train"):
        toy.run(from_stage="check")
    assert toy.ran == []


def test_unknown_stage_names_are_recipe_errors(toy: Toy) -> None:
    for options in ({"from_stage": "trian"}, {"until": "trian"}, {"force": {"trian"}}):
        with pytest.raises(RecipeError, match="did you mean 'train'"):
            toy.run(**options)
    with pytest.raises(RecipeError, match="nothing to run"):
        toy.run(from_stage="check", until="data")


def test_a_failed_gate_is_published_stops_the_walk_and_fails_again_without_work(toy: Toy) -> None:
    toy.gate_passes = False
    toy.stages = (*toy.stages[:3], toy._stage("deploy", ("check",), "parity"), toy.stages[3])
    toy.texts["deploy"] = "server"
    with pytest.raises(GateFailed, match=r"check failed 1 gate: toy AP is 1\.5, limit 1") as caught:
        toy.run()
    assert caught.value.exit_code == 3
    assert toy.ran == ["data", "train", "check", "report"]
    assert toy.reported["check"].manifest.gates[0]["passed"] is False
    assert toy.states() == ["done", "done", "failed gate", "missing", "done"]
    with pytest.raises(GateFailed):
        toy.run()
    assert toy.ran == []
    with pytest.raises(GateFailed):  # --from does not lead around a gate
        toy.run(from_stage="deploy")
    assert toy.ran == []


def test_a_stage_that_raises_leaves_a_failure_file_and_a_report(toy: Toy) -> None:
    toy.raises["check"] = RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"):
        toy.run()
    assert toy.ran == ["data", "train", "check", "report"]
    assert sorted(toy.reported) == ["data", "train"]
    failure = read_failure(toy.run_dir)
    assert failure is not None
    assert (failure["stage"], failure["type"], failure["message"]) == ("check", "RuntimeError", "boom")
    assert "Traceback" in failure["traceback"]
    assert not list(toy.run_dir.glob("check*"))
    with pytest.raises(RuntimeError, match="boom"):
        toy.run()
    assert toy.ran == ["check"]
    toy.raises.clear()
    toy.run()
    assert toy.ran == ["check", "report"]
    assert read_failure(toy.run_dir) is None


def test_a_failing_report_does_not_hide_the_first_failure(toy: Toy) -> None:
    toy.raises["check"] = RuntimeError("first")
    toy.stages = (*toy.stages[:3], toy._stage("report", ("data",), "parity", always=True))
    toy.texts["report"] = ""
    toy.raises["report"] = RuntimeError("second")
    with pytest.raises(RuntimeError, match="first"):
        toy.run()


def test_facts_may_not_name_the_partial_directory(toy: Toy) -> None:
    def run(context: StageContext) -> StageResult:
        return StageResult(facts={"path": context.directory / "x"})

    toy.stages = (Stage(name="data", version=1, inputs=(), config_sections=(), run=run),)
    with pytest.raises(ValueError, match="about to be renamed"):
        toy.run()


def test_a_resumable_stage_keeps_its_partial_directory_for_the_same_fingerprint(toy: Toy) -> None:
    toy.raises["train"] = KeyboardInterrupt()
    with pytest.raises(Interrupted, match="the same command goes on"):
        toy.run()
    assert toy.states()[1] == "partial"
    (left,) = toy.run_dir.glob("train.partial-*")
    (left / "checkpoint").write_text("half way")
    toy.raises.clear()
    toy.run()
    assert (toy.run_dir / "train" / "checkpoint").read_text() == "half way"
    assert not list(toy.run_dir.glob("*.partial-*"))


def test_a_partial_directory_of_another_fingerprint_is_deleted(toy: Toy) -> None:
    toy.raises["train"] = KeyboardInterrupt()
    with pytest.raises(Interrupted, match="the same command goes on"):
        toy.run()
    (left,) = toy.run_dir.glob("train.partial-*")
    toy.raises.clear()
    toy.config["training"] = {"num_iters": 11}
    toy.run()
    assert not left.exists()


def test_an_interrupted_stage_that_cannot_resume_leaves_nothing(toy: Toy) -> None:
    toy.raises["check"] = KeyboardInterrupt()
    with pytest.raises(Interrupted, match="the same command goes on"):
        toy.run()
    assert not list(toy.run_dir.glob("check*"))
    assert read_failure(toy.run_dir) is None
    assert "report" not in toy.ran


def _kill_between(toy: Toy, step: Callable[[Path, Path], None]) -> None:
    """Leave the folder as a kill between two renames of a publish would."""
    final, old = toy.run_dir / "train", toy.run_dir / "train.old"
    step(final, old)
    toy.run()
    assert toy.states() == ["done"] * 4
    assert not old.exists()


def test_a_publish_killed_after_the_first_rename_is_undone(toy: Toy) -> None:
    toy.run()
    _kill_between(toy, lambda final, old: final.rename(old) and None)
    assert toy.ran == []


def test_a_publish_killed_before_the_deletion_is_finished(toy: Toy) -> None:
    import shutil

    toy.run()
    _kill_between(toy, lambda final, old: shutil.copytree(final, old) and None)
    assert toy.ran == []


SCRIPT = """
    import sys, time
    from pathlib import Path
    from rich.console import Console
    from pipeline.errors import exit_code_of, message_of
    from pipeline.recipe import Recipe
    from pipeline.run import run_stages
    from pipeline.stage import Stage, StageResult

    slow = sys.argv[2]

    def stage(name, inputs, resumable=False):
        def run(context):
            steps = context.directory / "steps"
            with steps.open("a") as file:
                for step in range(len(steps.read_text()), 20):
                    file.write("x")
                    file.flush()
                    if name == slow:
                        print("step", step, flush=True)
                        time.sleep(0.2)
            return StageResult(facts={"resumed": resumable})
        return Stage(name=name, version=1, inputs=inputs, config_sections=(), resumable=resumable, run=run)

    stages = [stage("data", ()), stage("train", ("data",), True), stage("strip", ("train",))]
    try:
        run_stages(stages, Recipe(name="toy", path=Path("toy.py")), Path(sys.argv[1]), console=Console(stderr=True))
    except Exception as error:
        print(message_of(error), file=sys.stderr)
        sys.exit(exit_code_of(error))
"""


def _start(run_dir: Path, slow: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(run_dir), slow]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    )


def _wait_for_steps(process: subprocess.Popen[str], count: int) -> None:
    assert process.stdout is not None
    for _ in range(count):
        assert process.stdout.readline().startswith("step")


@pytest.mark.parametrize("stage", ["data", "train", "strip"])
def test_a_killed_run_completes_on_the_next_call(tmp_path: Path, stage: str) -> None:
    process = _start(tmp_path, stage)
    _wait_for_steps(process, 3)
    process.kill()
    process.communicate()
    assert not (tmp_path / stage).exists()
    again = _start(tmp_path, "none")
    output = again.communicate(timeout=60)
    assert again.returncode == 0, output
    for name in ("data", "train", "strip"):
        assert (open_artifact(tmp_path / name).directory / "steps").read_text() == "x" * 20
    assert ("goes on where it stopped" in output[1]) == (stage == "train")
    assert not list(tmp_path.glob("*.partial-*"))


def test_two_runs_at_once_are_refused_and_a_kill_releases_the_lock(toy: Toy) -> None:
    process = _start(toy.run_dir, "data")
    try:
        _wait_for_steps(process, 1)
        with pytest.raises(RunLocked, match=rf"pid {process.pid} on .+ since 20") as caught:
            toy.run()
        assert caught.value.exit_code == 4
        assert toy.ran == []
    finally:
        process.kill()
        process.communicate()
    assert toy.run(force=True).num_built == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_a_message_and_keeps_what_can_resume(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = _start(tmp_path, "train")
    _wait_for_steps(process, 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "the same command goes on" in errors
    assert not (tmp_path / ".lock-holder.json").exists()
    assert len(list(tmp_path.glob("train.partial-*"))) == 1


def test_a_worker_that_outlives_a_killed_run_does_not_hold_the_lock(toy: Toy) -> None:
    code = """
        import os, signal, sys, time
        from pathlib import Path
        from pipeline.lock import locked
        with locked(Path(sys.argv[1]), "a run with workers"):
            if os.fork() == 0:
                time.sleep(5)
                os._exit(0)
            print("step", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(toy.run_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    process.wait(timeout=30)
    assert toy.run().num_built == 4


def test_the_lock_holder_is_written_down_while_a_run_lasts(toy: Toy) -> None:
    seen: list[dict[str, Any]] = []

    def run(context: StageContext) -> StageResult:
        seen.append(json.loads((context.run_dir / ".lock-holder.json").read_text()))
        return StageResult()

    toy.stages = (Stage(name="data", version=1, inputs=(), config_sections=(), run=run),)
    toy.run()
    assert seen[0]["pid"] == os.getpid()
    assert seen[0]["command"] == toy.recipe.command


def test_walking_stages_imports_neither_torch_nor_detectron2() -> None:
    heavy = ("torch", "detectron2", "numpy")
    code = f"import sys, pipeline.run, pipeline.status; print([name for name in {heavy} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
