"""The whole pipeline on a tiny recipe, with the real detectron2, ONNX Runtime, TensorRT-RTX, tritonserver and gRPC."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import hear_ctrl_c
from PIL import Image

from pipeline.__main__ import main
from pipeline.stages import STAGES

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "tests" / "pipeline" / "tiny_recipe.py"
NAMES = [stage.name for stage in STAGES]
RUN = [sys.executable, "-m", "pipeline", "run", str(RECIPE)]


def killed_when_in(stage: str, runs: Path) -> None:
    """Start the run and kill it, with SIGKILL, as soon as it works in ``stage``."""
    run_dir = runs / RECIPE.stem
    process = subprocess.Popen(
        [*RUN, "--runs", str(runs)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(run_dir.glob(f"{stage}.partial-*")):
        assert process.poll() is None, f"the run ended before {stage}: {process.stderr and process.stderr.read()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)  # the precision stage of a float32 run is over in a moment
    if stage == "train":  # late enough to have something to go on from
        while not list(run_dir.glob("train.partial-*/last_checkpoint")) and process.poll() is None:
            time.sleep(0.02)
    if stage in ("deploy", "benchmark"):  # with the server up
        while not list(run_dir.glob(f"{stage}.partial-*/server.log")) and process.poll() is None:
            time.sleep(0.02)
        time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed once in every stage and then finished."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "started").touch()
    run_dir = folder / RECIPE.stem
    for stage in NAMES:
        killed_when_in(stage, folder)
        assert not (run_dir / stage).exists(), "a stage that was killed must not leave an artifact"
    done = subprocess.run(
        [*RUN, "--runs", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "report:" in done.stdout
    return folder


@pytest.fixture
def copied_runs(runs: Path, tmp_path: Path) -> Path:
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def pipeline(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["pipeline", *map(str, arguments)])
    with pytest.raises(SystemExit) as ending:
        main()
    return int(ending.value.code or 0)


def manifest(runs: Path, stage: str) -> dict:
    return json.loads((runs / RECIPE.stem / stage / "manifest.json").read_text())


def test_killed_in_every_stage_the_same_command_completes_and_leaves_nothing_half_done(runs: Path) -> None:
    run_dir = runs / RECIPE.stem
    assert [stage for stage in NAMES if (run_dir / stage / "manifest.json").is_file()] == NAMES
    assert list(run_dir.glob("*.partial*")) == []
    assert manifest(runs, "train")["facts"]["num_resumed"] >= 1


def test_no_server_of_a_killed_or_finished_run_is_left(runs: Path) -> None:
    started = (runs / "started").stat().st_mtime
    deadline = time.monotonic() + 15
    while True:
        left = [
            p.pid
            for p in psutil.process_iter(["cmdline", "create_time"])
            if p.info["create_time"] > started and "tritonserver" in " ".join(p.info["cmdline"] or [])
        ]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert left == []


def test_every_row_of_the_accuracy_table_is_measured_or_says_why_not(runs: Path) -> None:
    rows = manifest(runs, "validate")["facts"]["rows"] + manifest(runs, "deploy")["facts"]["rows"]
    status = {row["name"]: row["status"] for row in rows}
    assert list(status) == [
        "detectron2",
        "torch, fixed canvas",
        "torch, export graph",
        "ONNX Runtime",
        "ONNX Runtime, TensorRT provider",
        "TensorRT",
        "Triton, concurrency 1",
        "Triton, concurrency 8",
    ]
    for row in rows:
        if row["status"] == "not run":
            assert row["reason"]
        else:
            assert (row["status"], len(row["digest"])) == ("passed", 64)
            assert 0 <= row["AP"] <= 100
    matching = manifest(runs, "validate")["facts"]["matching"]
    assert matching["num_matched"] > 50, "the comparison must have something to compare"
    assert matching["num_unmatched"] == 0


def test_every_step_of_the_ladder_is_measured_and_none_loses(runs: Path) -> None:
    validated, deployed = manifest(runs, "validate")["facts"], manifest(runs, "deploy")["facts"]
    steps = [row for row in validated["rows"] + deployed["rows"] if row.get("compared_with")]
    assert [(row["name"], row["compared_with"]) for row in steps if "TensorRT" not in row["name"]] == [
        ("torch, fixed canvas", "detectron2"),
        ("torch, export graph", "torch, fixed canvas"),
        ("ONNX Runtime", "torch, export graph"),
        ("Triton, concurrency 1", "ONNX Runtime"),
        ("Triton, concurrency 8", "Triton, concurrency 1"),
    ]
    assert validated["first_lossy_rung"] is deployed["first_lossy_rung"] is None
    for row in steps[1:]:
        assert row["gates"], "every rung is held to the one before"
        interval = row["differences"]["AP"]
        assert interval["low"] <= interval["value"] <= interval["high"]
        assert row["agreement"]["num_detections"] > 100
        assert row["agreement"]["matched_rate"] > 0.99
        assert row["agreement"]["score_error_p99"] < 1e-4
    assert "requests in" in deployed["rows"][1]["reason"]


def test_head_tensors_agree_on_every_level_of_graph_and_file(runs: Path) -> None:
    rows = manifest(runs, "validate")["facts"]["head_tensors"]
    assert {(row["rung"], row["tensor"], row["level"]) for row in rows} == {
        (rung, tensor, level)
        for rung in ("torch, export graph", "ONNX Runtime")
        for tensor in ("class_logits", "box_deltas")
        for level in range(5)
    }
    assert all(row["max_abs_error"] <= 1e-4 * row["max_abs_value"] for row in rows)


def test_images_that_changed_are_pictures_of_the_artifact_and_of_the_report(runs: Path) -> None:
    run_dir = runs / RECIPE.stem
    shown = json.loads((run_dir / "report" / "report.json").read_text())["ladder"]["changed_images"]
    recorded = manifest(runs, "validate")["facts"]["changed_images"]
    assert 0 < len(recorded) <= 12
    assert [image["file"] for image in shown if image["stage"] == "validate"] == [image["file"] for image in recorded]
    for image in recorded:
        with Image.open(run_dir / "validate" / image["file"]) as picture:
            assert picture.format == "JPEG"


def test_the_strip_proof_holds_and_names_what_was_removed(runs: Path) -> None:
    proof = manifest(runs, "strip")["facts"]
    assert proof["tensors_identical"]
    assert proof["keys_are_stock"]
    assert proof["max_abs_difference"] == 0.0
    assert proof["num_teacher_tensors_in_student"] == 0
    assert {part["part"] for part in proof["removed"]} >= {"adapter", "implicit_teacher.label_encoder"}
    assert manifest(runs, "export")["facts"]["num_teacher_initializers"] == 0


def test_the_report_says_pass_and_is_one_file_without_network(runs: Path) -> None:
    folder = runs / RECIPE.stem / "report"
    report = json.loads((folder / "report.json").read_text())
    assert report["verdict"]["status"] == "PASS"
    html = (folder / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", html)
    assert len(report["gallery"]) >= 8
    assert "PASS" in (folder / "report.md").read_text()


def test_a_second_call_does_nothing_and_says_so(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {stage: manifest(runs, stage)["finished"] for stage in NAMES}
    assert pipeline(monkeypatch, "run", RECIPE, "--runs", runs) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {stage: manifest(runs, stage)["finished"] for stage in NAMES} == before


@pytest.mark.parametrize("stage", NAMES)
def test_a_flipped_byte_in_any_artifact_is_named_with_exit_code_5(
    copied_runs: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f for f in (copied_runs / RECIPE.stem / stage).rglob("*") if f.is_file() and f.name != "manifest.json"]
    victim = max(files, key=lambda f: f.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert pipeline(monkeypatch, "run", RECIPE, "--runs", copied_runs) == 5
    assert victim.name in capsys.readouterr().err


def test_a_flipped_byte_in_the_published_version_is_named_with_exit_code_5(
    copied_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = copied_runs / RECIPE.stem / "model_repository" / "tiny" / "1" / "model.onnx"
    content = bytearray(victim.read_bytes())
    content[1000] ^= 1
    victim.write_bytes(content)
    assert pipeline(monkeypatch, "run", RECIPE, "--runs", copied_runs) == 5
    assert "model.onnx" in capsys.readouterr().err


def test_a_failed_gate_stops_the_run_with_exit_code_3_and_a_report_that_says_so(
    copied_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("run", RECIPE, "benchmark.max_p99_ms=0.001", "--runs", copied_runs)
    for _ in range(2):  # the verdict is kept, not only seen once
        assert pipeline(monkeypatch, *arguments) == 3
        assert "p99 latency" in capsys.readouterr().err
    report = json.loads((copied_runs / RECIPE.stem / "report" / "report.json").read_text())
    assert report["verdict"]["status"] == "FAIL"


def test_training_without_a_distiller_is_a_run_of_its_own(copied_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = pipeline(monkeypatch, "run", RECIPE, "distiller=none", "--until", "strip", "--runs", copied_runs)
    assert code == 0
    assert manifest(copied_runs, "train")["facts"]["num_parameters"]["distiller"] == 0
    assert manifest(copied_runs, "strip")["facts"]["removed"] == []


def test_a_data_set_of_ones_own_takes_the_embedded_ones_place(
    copied_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own set"
    shutil.copytree(copied_runs / RECIPE.stem / "data", own)
    overrides = [f"dataset.{split}={own}/instances_{split}.json" for split in ("train", "validation")]
    assert pipeline(monkeypatch, "run", RECIPE, *overrides, "--until", "data", "--runs", copied_runs) == 0
    facts = manifest(copied_runs, "data")["facts"]
    assert not facts["embedded"]
    assert facts["train"]["annotation_file"] == str(own / "instances_train.json")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "no-such-recipe"], "no recipe 'no-such-recipe'"),
        (["run", "embedded", "trainng.max_iter=3"], "trainng"),
        (["run", "embedded", "training.max_itr=3"], "max_iter"),
        (["run", "embedded", "training.max_iter=many"], "training.max_iter"),
        (["run", "embedded", "distiller=lgdd"], "lgd"),
        (["run", "embedded", "dataset.train=/nowhere.json", "dataset.validation=/nowhere.json"], "/nowhere.json"),
        (["run", "embedded", "--until", "serve"], "data, train, strip"),
        (["run", "--frobnicate"], "frobnicate"),
    ],
)
def test_a_wrong_recipe_or_command_is_one_message_with_exit_code_2(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pipeline(monkeypatch, *arguments, "--runs", tmp_path / "runs") == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def served(runs: Path) -> Iterator[str]:
    """`serve` in the foreground on free ports; the value is its gRPC address."""
    ports = [option for name in ("grpc", "http", "metrics") for option in (f"--{name}-port", "0")]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "serve", "--runs", str(runs), "--name", RECIPE.stem, *ports],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=hear_ctrl_c,
    )
    assert process.stdout is not None
    url = next(match[1] for line in process.stdout if (match := re.search(r"gRPC +(\S+)", line)))
    yield url
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(30) == 130, "Ctrl-C ends it in order"
    finally:
        process.kill()


@pytest.fixture
def photo(runs: Path) -> Path:
    return next((runs / RECIPE.stem / "data").rglob("*.jpg"))


def test_detect_prints_json_and_draws_what_the_server_finds(
    served: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "new folder" / "drawn.png"
    arguments = ("detect", photo, "--url", served, "--min-score", "0.0", "--json", "--draw", drawn)
    assert pipeline(monkeypatch, *arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["detections"]
    width, height = Image.open(photo).size
    for found in record["detections"]:
        x1, y1, x2, y2 = found["box"]
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
    assert Image.open(drawn).size[0] >= width


def test_detect_prints_a_table(
    served: str, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline(monkeypatch, "detect", photo, "--url", served, "--min-score", "0.99") == 0
    assert "0 detections" in capsys.readouterr().out


def test_the_readmes_client_runs_as_it_stands(served: str, photo: Path, tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    script = code[1].replace("localhost:8001", served).replace("embedded_retinanet_256_fp32", "tiny")
    shutil.copy(photo, tmp_path / "photo.jpg")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(\w+ 0\.\d\d \[.*\]\n)+", done.stdout)


def test_an_unusable_image_is_named_with_exit_code_2(
    served: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(photo.read_bytes()[:-300])
    gigantic = tmp_path / "gigantic.png"
    Image.fromarray(np.zeros((20_000, 20_000), np.uint8)).save(gigantic)
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    for path in (truncated, gigantic, text, tmp_path / "missing.jpg"):
        assert pipeline(monkeypatch, "detect", path, "--url", served) == 2
        assert path.name in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_named_with_exit_code_4(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline(monkeypatch, "detect", photo, "--url", "127.0.0.1:9") == 4
    assert "127.0.0.1:9" in capsys.readouterr().err


def test_a_port_in_use_is_named_with_exit_code_4(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = ("serve", "--runs", runs, "--name", RECIPE.stem, "--grpc-port", port)
        assert pipeline(monkeypatch, *arguments, "--http-port", 0, "--metrics-port", 0) == 4
    error = capsys.readouterr().err
    assert f"grpc port {port}" in error
    assert "--grpc-port" in error


def test_serving_a_run_that_was_never_deployed_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline(monkeypatch, "serve", "--runs", tmp_path, "--name", "nothing") == 5
    assert "make train-export-deploy" in capsys.readouterr().err
