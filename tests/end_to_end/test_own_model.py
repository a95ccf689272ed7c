"""A detectron2 model that was trained elsewhere, from its configuration and checkpoint to a measured live endpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conformance.generated_datasets import CLASS_NAMES, overrides_for
from tests.own_models import command_line, own_model

pytestmark = [pytest.mark.server, pytest.mark.slow]
BENCHMARK = ("benchmark.seconds_per_point=0.3", "benchmark.concurrencies=[1]", "benchmark.warmup_requests=1")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported with a data set, then validated, deployed and benchmarked, each by its own command."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "data").mkdir()
    model = own_model("RetinaNet", folder / "model")
    validation = overrides_for("coco", folder / "data")[1]
    run_dir = folder / "runs" / "mine"
    assert command_line(*model.arguments(run_dir, "export.max_batch_size=2", validation)) == 0
    for path in (model.config, model.weights):  # the folder needs neither any more
        path.unlink()
    assert command_line("validate", run_dir, "--bisect") == 0
    assert command_line("deploy", run_dir) == 0
    assert command_line("benchmark", run_dir, *BENCHMARK) == 0
    assert command_line("report", run_dir) == 0
    return run_dir


def manifest(run_dir: Path, stage: str) -> dict:
    return json.loads((run_dir / stage / "manifest.json").read_text())


def test_detections_are_detectron2s_up_to_the_endpoint(run_dir: Path) -> None:
    matching = manifest(run_dir, "validate")["facts"]["matching"]
    assert matching["num_matched"] > 100
    assert matching["num_unmatched"] == 0
    rows = manifest(run_dir, "validate")["facts"]["rows"] + manifest(run_dir, "deploy")["facts"]["rows"]
    assert {row["name"] for row in rows if row["status"] == "passed"} >= {"detectron2", "ONNX Runtime"}
    assert any(row["name"].startswith("Triton") and row["status"] == "passed" for row in rows)


def test_no_node_of_the_exported_file_departs_from_detectron2(run_dir: Path) -> None:
    found = json.loads((run_dir / "bisect.json").read_text())
    assert (found["first_lossy_rung"], found["rung"], found["departure"]) == (None, None, None)
    assert len(found["compared"]) == 4
    assert found["files"]["export/model.onnx"] == manifest(run_dir, "export")["files"]["model.onnx"]["sha256"]


def test_the_classes_are_those_of_the_data_set(run_dir: Path) -> None:
    signature = json.loads((run_dir / "export" / "signature.json").read_text())
    assert signature["class_names"] == list(CLASS_NAMES)


def test_the_report_passes_and_says_that_the_training_was_elsewhere(run_dir: Path) -> None:
    report = json.loads((run_dir / "report" / "report.json").read_text())
    assert report["verdict"]["status"] == "PASS"
    not_run = {part["what"]: part["reason"] for part in report["verdict"]["not_run"]}
    assert "model_final.pth" in not_run["stage train"]
    assert report["strip"]["status"] == "not run"
    assert {stage["stage"]: stage["status"] for stage in report["lineage"]}["train"] == "not run"
    assert "trained elsewhere" in (run_dir / "report" / "report.html").read_text()


def test_a_second_call_does_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("run", run_dir, "--until", "benchmark") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert command_line("status", "--runs", run_dir.parent) == 0
    assert "stale" not in capsys.readouterr().out
