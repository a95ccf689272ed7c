"""The report: manifests in, three files out, for runs that passed, failed, crashed or never got far."""

from __future__ import annotations

import html.parser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.signature import Detections
from pipeline.artifact import Manifest
from pipeline.baseline import Baseline
from pipeline.report import GalleryImage, build_report, write_report
from pipeline.report.build import STAGE_READS
from pipeline.report.charts import charts
from pipeline.report.gallery import draw_boxes
from pipeline.report.metrics import is_metric, label_of
from pipeline.report.render import capability, shell_lines, text_of
from pipeline.report_stage import _shown

MANIFESTS = Path(__file__).with_name("test_report_manifests.json")
NO_GPU = "no NVIDIA GPU"
ENVIRONMENT = {
    "platform": "Linux-6.1 x86_64",
    "cpu": "AMD EPYC 7B13",
    "num_cores": 2,
    "memory_bytes": 8_262_000_000,
    "gpus": [],
    "gpu_reason": NO_GPU,
    "versions": {"torch": "2.14.1", "onnxruntime": "1.31.1", "tensorrt": None, "tritonserver": "2.63.0"},
    "commit": "9079f93",
}


@pytest.fixture
def manifests() -> dict[str, dict[str, Any]]:
    """What the stages of a run without a GPU leave behind."""
    found: dict[str, dict[str, Any]] = json.loads(MANIFESTS.read_text())
    return found


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with the training log; its last line is cut short as a crash would leave it."""
    (tmp_path / "train").mkdir()
    terms = {"loss_cls": 300, "loss_box_reg": 900, "distill_loss": 500, "total_loss": 400}
    lines = [
        json.dumps({"iteration": i, "lr": 0.01, **{name: 1 / (1 + i / pace) for name, pace in terms.items()}})
        for i in range(0, 3000, 5)
    ]
    (tmp_path / "train" / "metrics.json").write_text("\n".join(lines) + '\n{"iteration": 3000, "total')
    return tmp_path


def gallery_of(count: int) -> list[GalleryImage]:
    random = np.random.default_rng(0)
    boxes = np.array([[20, 20, 90, 80], [100, 30, 140.5, 70], [0, 0, 3, 2]], dtype=np.float32)
    found = Detections(
        boxes=boxes, scores=np.array([0.9, 0.6, 0.1], dtype=np.float32), labels=np.array([0, 3, 9], dtype=np.int32)
    )
    empty = Detections(boxes=np.zeros((0, 4)), scores=np.zeros(0), labels=np.zeros(0, dtype=np.int32))
    return [
        GalleryImage(
            image_id=index,
            image=random.integers(0, 255, (120, 160, 3), dtype=np.uint8),
            boxes=boxes[:2],
            labels=np.array([0, 3]),
            detections={"ONNX Runtime": found if index else empty},
        )
        for index in range(count)
    ]


def report_of(run_dir: Path, manifests: dict[str, Any], **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"failure": None, "recipe_name": "embedded", "environment": ENVIRONMENT, "gallery": []}
    return build_report(run_dir, manifests=manifests, **{**settings, **more})


def written(report: dict[str, Any], directory: Path) -> tuple[str, str]:
    """The HTML and the Markdown of a report."""
    write_report(report, directory / "report")
    assert json.loads((directory / "report" / "report.json").read_text()) == report
    return (directory / "report" / "report.html").read_text(), (directory / "report" / "report.md").read_text()


class PageReader(html.parser.HTMLParser):
    """Visible words, tags, ids and outside references of an HTML page."""

    VOID = frozenset({"meta", "link", "img", "br", "path", "use", "rect", "stop"})

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [str(values["id"])] if "id" in values else []
        self.references += [str(values[key]) for key in ("href", "src", "xlink:href") if key in values]
        self.images += [values] if tag == "img" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read_page(page: str) -> PageReader:
    reader = PageReader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_a_run_without_a_gpu_passes_and_says_what_was_not_run(manifests: Any, run_dir: Path) -> None:
    report = report_of(run_dir, manifests)
    assert report["verdict"]["status"] == "PASS"
    assert "4 parts were not run" in report["verdict"]["sentence"]
    not_run = {item["what"]: item["reason"] for item in report["verdict"]["not_run"]}
    assert not_run == {
        "engine inspector": NO_GPU,
        "running the engine": NO_GPU,
        "accuracy of TensorRT": NO_GPU,
        "container command": "never executed here: no Docker engine was found",
    }
    page, markdown = written(report, run_dir)
    for what in not_run:
        assert what in read_page(page).text
        assert what in markdown


def test_the_reference_row_comes_first_and_every_row_has_its_differences(manifests: Any, run_dir: Path) -> None:
    rows = report_of(run_dir, manifests)["accuracy"]["rows"]
    assert [row["name"] for row in rows][:2] == ["detectron2", "torch, fixed canvas"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["torch, fixed canvas"]["delta_to_reference"] == pytest.approx(-0.09)
    assert by_name["torch, fixed canvas"]["delta_to_canvas"] is None
    live = by_name["Triton, concurrency 8"]
    assert live["delta_to_reference"] == pytest.approx(24.928 - 25.02)
    assert live["delta_to_canvas"] == pytest.approx(24.928 - 24.93)
    assert live["gates"] == [
        {"name": "AP drop, Triton, concurrency 8", "value": 0.002, "limit": 0.05, "status": "passed"}
    ]
    assert live["size_bytes"] == 49_900_000
    assert by_name["TensorRT"]["delta_to_canvas"] is None


def test_a_failed_gate_is_named_first_and_the_rest_of_the_report_is_there(manifests: Any, run_dir: Path) -> None:
    manifests["validate"]["gates"][0].update(value=1.4, passed=False, reason="largest drop: 'crab' −6.1")
    del manifests["deploy"], manifests["benchmark"]
    failure = {"stage": "validate", "type": "GateFailed", "message": "validate failed 1 gate"}
    report = report_of(run_dir, manifests, failure=failure)
    sentence = "Gate “AP drop, ONNX Runtime” of stage validate failed: 1.4, limit 0.05. largest drop: 'crab' −6.1."
    sentence += " The first lossy step is ONNX Runtime."
    assert report["verdict"]["status"] == "FAIL"
    assert report["verdict"]["sentence"] == sentence
    page, markdown = written(report, run_dir)
    assert "<title>FAIL at validate" in page
    assert markdown.startswith("# FAIL at validate: embedded\n")
    assert "the run stopped at validate" in read_page(page).text
    assert "40.3" in page  # AP50 of the rows that were measured


def test_a_failed_gate_without_a_recorded_failure_still_fails(manifests: Any, run_dir: Path) -> None:
    manifests["benchmark"]["gates"][0]["passed"] = False
    report = report_of(run_dir, manifests)
    assert report["verdict"]["status"] == "FAIL"
    assert {stage["stage"]: stage["status"] for stage in report["lineage"]}["benchmark"] == "failed"


@pytest.mark.parametrize("stage", STAGE_READS)
def test_a_crash_in_any_stage_still_gives_a_complete_report(stage: str, manifests: Any, run_dir: Path) -> None:
    stages = list(STAGE_READS)
    left = {name: manifests[name] for name in stages[: stages.index(stage)]}
    failure = {"stage": stage, "type": "OSError", "message": "port 8001 is <in use>\nby another server"}
    report = report_of(run_dir, left, failure=failure)
    assert report["verdict"]["sentence"] == f"Stage {stage} stopped with OSError: port 8001 is <in use>"
    after = [f"stage {name}" for name in stages[stages.index(stage) + 1 :]]
    assert [item["what"] for item in report["verdict"]["not_run"] if item["what"].startswith("stage ")] == after
    page, markdown = written(report, run_dir)
    assert f"<title>FAIL at {stage}" in page
    assert "by another server" in read_page(page).text
    assert "<in use>" not in page
    assert "by another server" in markdown


def test_a_run_that_was_told_to_stop_early_is_incomplete_not_passed(manifests: Any, run_dir: Path) -> None:
    report = report_of(run_dir, {name: manifests[name] for name in ("data", "train", "strip")})
    assert report["verdict"]["status"] == "INCOMPLETE"
    assert {"what": "stage export", "reason": "not part of this run"} in report["verdict"]["not_run"]


@pytest.mark.parametrize("stage", STAGE_READS)
def test_facts_that_are_missing_never_break_the_report(stage: str, manifests: Any, run_dir: Path) -> None:
    facts = manifests[stage]["facts"]
    for key in facts:
        less = {name: value for name, value in facts.items() if name != key}
        report_of(run_dir, {**manifests, stage: {**manifests[stage], "facts": less}})
    write_report(report_of(run_dir, {**manifests, stage: {"stage": stage, "facts": dict.fromkeys(facts)}}), run_dir)
    write_report(report_of(run_dir, {**manifests, stage: {"stage": stage}}), run_dir)


def test_a_number_that_json_cannot_say_becomes_null(manifests: Any, run_dir: Path) -> None:
    manifests["validate"]["facts"]["rows"][1]["APs"] = float("nan")
    report = report_of(run_dir, manifests)
    assert report["accuracy"]["rows"][0]["APs"] is None
    written(report, run_dir)


def test_an_engine_that_was_not_built_says_why(manifests: Any, run_dir: Path) -> None:
    manifests["engine"]["facts"] = {"status": "not run", "reason": "no TensorRT library is installed"}
    report = report_of(run_dir, manifests)
    assert {"what": "stage engine", "reason": "no TensorRT library is installed"} in report["verdict"]["not_run"]
    assert {stage["stage"]: stage["status"] for stage in report["lineage"]}["engine"] == "not run"
    assert report["verdict"]["status"] == "INCOMPLETE"
    assert report["verdict"]["sentence"].endswith("engine did not run: no TensorRT library is installed.")


def test_a_model_that_was_trained_elsewhere_passes_and_the_report_says_where_from(
    manifests: Any, run_dir: Path, tmp_path: Path
) -> None:
    del manifests["train"]
    imported = {"checkpoint": "/models/model_final.pkl", "sha256": "0123456789abcdef"}
    manifests["strip"]["facts"] = {"imported_from": imported, "num_tensors": 124}
    report = report_of(run_dir, manifests)
    assert report["verdict"]["status"] == "PASS"
    where = "the model is /models/model_final.pkl, sha256 0123456789ab"
    assert {"what": "stage train", "reason": f"trained elsewhere; {where}"} in report["verdict"]["not_run"]
    assert report["strip"]["status"] == report["distillation"]["status"] == "not run"
    page, markdown = written(report, tmp_path)
    assert where in markdown
    assert where in read_page(page).text

    manifests["data"]["facts"] = {"status": "not run", "reason": "no data set is named"}
    verdict = report_of(run_dir, manifests)["verdict"]
    assert verdict["status"] == "INCOMPLETE"
    assert verdict["sentence"].endswith("but data did not run: no data set is named.")


def without_docker(manifests: dict[str, Any]) -> str:
    """Turns the manifests into those of ``serving.server=container`` without a Docker engine; the value is why."""
    reason = "never executed here: no Docker engine answered (docker is not installed)"
    deploy = manifests["deploy"]
    container = {"command": "docker run --rm --gpus=all tritonserver", "executed": False, "reason": reason}
    row = {"name": "Triton", "status": "not run", "reason": reason}
    deploy["facts"] = {"status": "not run", "reason": reason, "server": "container", "container": container}
    deploy["facts"]["rows"] = [row]
    deploy["gates"] = manifests["benchmark"]["gates"] = []
    manifests["benchmark"]["facts"] = {"status": "not run", "reason": reason}
    return reason


def test_a_skipped_stage_never_looks_like_a_pass(manifests: Any, run_dir: Path) -> None:
    reason = without_docker(manifests)
    report = report_of(run_dir, manifests)
    assert report["verdict"]["status"] == "INCOMPLETE"
    assert report["verdict"]["sentence"].endswith(
        f"gates that ran passed, but deploy and benchmark did not run: {reason}."
    )
    for what in ("stage deploy", "stage benchmark", "accuracy of Triton", "container command"):
        assert {"what": what, "reason": reason} in report["verdict"]["not_run"]
    for stage in report["lineage"][-2:]:
        assert (stage["status"], stage["reason"]) == ("not run", reason)
    for section in ("deployment", "latency"):
        assert (report[section]["status"], report[section]["reason"]) == ("not run", reason)
    page, markdown = written(report, run_dir)
    assert "<title>INCOMPLETE" in page
    assert "2 s · passed" not in re.sub(r"(?s).*>benchmark<", "", page)
    for text in (read_page(page).text, markdown):
        assert "docker run --rm --gpus=all tritonserver" in text  # what to type on a machine that has Docker
        assert text.count(reason) >= 8


def test_a_failed_gate_outweighs_a_skipped_stage(manifests: Any, run_dir: Path) -> None:
    without_docker(manifests)
    manifests["validate"]["gates"][0]["passed"] = False
    assert report_of(run_dir, manifests)["verdict"]["status"] == "FAIL"


def test_a_row_that_failed_is_never_part_of_a_pass(manifests: Any, run_dir: Path) -> None:
    manifests["validate"]["facts"]["rows"][2].update(status="failed", reason="exported but not validated")
    verdict = report_of(run_dir, manifests)["verdict"]
    assert (verdict["status"], verdict["stage"]) == ("FAIL", "validate")
    assert verdict["sentence"] == "Accuracy of ONNX Runtime failed: exported but not validated"


def test_a_row_whose_gate_failed_is_not_called_passed(manifests: Any, run_dir: Path) -> None:
    manifests["validate"]["gates"][0]["passed"] = False
    rows = {row["name"]: row["status"] for row in report_of(run_dir, manifests)["accuracy"]["rows"]}
    assert rows["ONNX Runtime"] == "failed"
    assert rows["torch, fixed canvas"] == "passed"


def test_the_gate_of_a_precision_fails_its_own_row_and_not_the_exported_files(manifests: Any, run_dir: Path) -> None:
    rows, gates = manifests["validate"]["facts"]["rows"], manifests["validate"]["gates"]
    name = "ONNX Runtime, int8 (TensorRT's file)"
    gate = f"AP of {name} minus that of torch, fixed canvas, at least"
    rows.append({**next(row for row in rows if row["name"] == "ONNX Runtime"), "name": name, "gates": [gate]})
    gates.append({**gates[0], "name": gate, "passed": False})
    status = {row["name"]: row["status"] for row in report_of(run_dir, manifests)["accuracy"]["rows"]}
    assert (status[name], status["ONNX Runtime"]) == ("failed", "passed")


def test_what_a_precision_was_made_of_is_shown(manifests: Any, run_dir: Path) -> None:
    for text in written(report_of(run_dir, manifests), run_dir):
        assert "fp32, which the exported file has" in text
    file = {
        "method": "NVIDIA ModelOpt: Q/DQ",
        "num_calibration_images": 512,
        "layers_by_type": {"INT8": 84, "FLOAT": 15},
    }
    manifests["precision"]["facts"] = {"precision": "int8", "files": {"model.onnx": {**file, "num_float32_nodes": 446}}}
    page, markdown = written(report_of(run_dir, manifests), run_dir)
    for text in (read_page(page).text, markdown):
        assert "NVIDIA ModelOpt: Q/DQ, 512 training images" in text
        assert "446 float32 nodes" in text


def test_training_is_shown_at_its_start_a_quarter_and_its_end(manifests: Any, run_dir: Path) -> None:
    training = report_of(run_dir, manifests)["distillation"]
    assert [mark["iteration"] for mark in training["ap_at"]] == [0, 750, 3000]
    assert set(training["losses"]) == {"total_loss", "loss_cls", "loss_box_reg", "distill_loss"}
    assert all(len(points) <= 200 for points in training["losses"].values())
    del manifests["train"]["facts"]["ap_curve"][1]
    marks = report_of(run_dir, manifests)["distillation"]["ap_at"]
    assert marks[1]["status"] == "not run"
    assert marks[1]["reason"] == "no evaluation near 25% of training"


def test_a_training_that_crashed_still_shows_its_losses(manifests: Any, run_dir: Path) -> None:
    (run_dir / "train").rename(run_dir / "train.partial-0123456789ab")
    report = report_of(run_dir, {"data": manifests["data"]}, failure={"stage": "train", "type": "E", "message": "m"})
    assert "total_loss" in report["distillation"]["losses"]


def test_the_page_stands_alone_with_unique_ids_and_described_images(manifests: Any, run_dir: Path) -> None:
    page, _ = written(report_of(run_dir, manifests, gallery=gallery_of(12)), run_dir)
    reader = read_page(page)
    assert len(page) < 10_000_000
    assert len(reader.ids) == len(set(reader.ids))
    inside = re.compile(r"#|data:|\.\./\w+/manifest\.json$|report\.(json|md)$")
    assert [reference for reference in reader.references if not inside.match(reference)] == []
    anchors = [reference[1:] for reference in reader.references if reference.startswith("#")]
    assert set(anchors) <= set(reader.ids)
    assert "@import" not in page
    assert "#0000" not in page  # every placeholder colour became one of the page's own
    assert len(reader.images) == 24
    assert all(image["alt"] for image in reader.images)
    assert reader.images[1]["alt"] == "Image 0, ONNX Runtime: 0 detections above score 0.3 (none)"
    assert "whale & <calf> 0.60" in str(reader.images[3]["alt"])
    assert page.count("<svg") == 7


def test_text_from_outside_cannot_become_markup(manifests: Any, run_dir: Path) -> None:
    manifests["validate"]["facts"]["rows"][0]["reason"] = "<script>alert(1)</script> | pipe"
    page, markdown = written(report_of(run_dir, manifests, recipe_name="<b>bold</b>"), run_dir)
    assert "<script" not in page
    assert "<b>bold" not in page
    row = next(line for line in markdown.splitlines() if "alert(1)" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 15


def test_every_table_of_the_markdown_is_rectangular(manifests: Any, run_dir: Path) -> None:
    _, markdown = written(report_of(run_dir, manifests), run_dir)
    for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
        assert block.splitlines()[1].startswith("|-"), block


def test_each_command_appears_once_with_everything_it_gives(manifests: Any, run_dir: Path) -> None:
    commands = report_of(run_dir, manifests)["commands"]
    assert len({item["command"] for item in commands}) == len(commands)
    given = {what: item["command"] for item in commands for what in item["gives"]}
    assert {what for what in given if what.startswith("stage ")} == {f"stage {stage}" for stage in STAGE_READS}
    for row, stage in (("ONNX Runtime", "validate"), ("TensorRT", "validate"), ("Triton, concurrency 8", "deploy")):
        assert given[f"row {row}"] == given[f"stage {stage}"] == f"python -m pipeline run embedded --until {stage}"


def test_numbers_are_written_for_reading() -> None:
    assert [text_of(value) for value in (0.05, -3.1e-05, 0.0, 1834, True)] == [
        "0.05",
        "−3.1e−5",
        "0",
        "1\u202f834",
        "yes",
    ]
    assert [capability(value) for value in ("75", "120")] == ["7.5", "12.0"]
    command = "docker run " + " ".join(f"--option-{index}='a  value'" for index in range(20))
    assert max(map(len, shell_lines(command).splitlines())) < 120
    assert shlex.split(shell_lines(command).replace("\\\n", "")) == shlex.split(command)


@pytest.mark.parametrize(("slowest", "word"), [(20.0, ">latency (ms)<"), (2000.0, ">latency (ms, logarithmic)<")])
def test_one_slow_percentile_does_not_flatten_the_latency_chart(
    slowest: float, word: str, manifests: Any, run_dir: Path
) -> None:
    for row in manifests["benchmark"]["facts"]["closed_loop"]:
        row.update(p50_ms=15.0, p99_ms=slowest)
    manifests["benchmark"]["facts"]["in_process"].update(p50_ms=14.0)
    assert word in charts(report_of(run_dir, manifests))["latency"]


def test_a_stage_with_thousands_of_files_is_listed_by_its_largest(manifests: Any, run_dir: Path) -> None:
    manifests["data"]["files"] = {f"{i:04}.jpg": {"sha256": "0" * 64, "size_bytes": i} for i in range(2400)}
    report = report_of(run_dir, manifests)
    assert [file["name"] for file in report["lineage"][0]["files"][:2]] == ["2399.jpg", "2398.jpg"]
    page, _ = written(report, run_dir)
    assert page.count(".jpg ") == len(report["lineage"][0]["files"]) == 12
    assert "2\u202f396 more" in page


def test_captions_do_not_cover_each_other() -> None:
    boxes = np.array([[40, 60, 150, 140], [41, 61, 151, 141], [42, 62, 149, 139]], dtype=np.float32)
    picture = Image.new("RGB", (400, 200))
    alone = [np.array(draw_boxes(picture, boxes[i : i + 1], np.array([i]), ["worm 0.5"])) for i in range(3)]
    together = np.array(draw_boxes(picture, boxes, np.arange(3), ["worm 0.5"] * 3))
    for image in alone:
        colour = image[60:62, 60:140].reshape(-1, 3).max(axis=0)
        painted = np.all(image == colour, axis=-1).sum()
        assert np.all(together == colour, axis=-1).sum() > 0.6 * painted


def test_the_gallery_shows_objects_of_different_sizes_from_all_over_the_set() -> None:
    def record(index: int, *edges: int) -> dict[str, Any]:
        objects = [{"bbox": [0, 0, edge, edge], "iscrowd": 0, "category_id": 0} for edge in edges]
        return {"image_id": index, "annotations": objects}

    sizes = [(10,), (), (10, 50, 120), (50, 50), tuple(range(8, 140, 4))] * 20
    shown = _shown([record(index, *edges) for index, edges in enumerate(sizes)])
    assert [image["image_id"] for image in shown] == list(range(2, 100, 10))
    assert _shown([record(0), record(1)]) == []


def test_the_ladder_shows_every_step_with_its_interval_and_the_largest_loss(manifests: Any, run_dir: Path) -> None:
    report = report_of(run_dir, manifests)
    ladder = report["ladder"]
    assert [(row["name"], row["compared_with"]) for row in ladder["rows"]] == [
        ("detectron2", None),
        ("torch, fixed canvas", "detectron2"),
        ("ONNX Runtime", "torch, fixed canvas"),
        ("TensorRT", None),
        ("Triton, concurrency 1", "ONNX Runtime"),
        ("Triton, concurrency 8", "Triton, concurrency 1"),
    ]
    assert ladder["rows"][1]["difference"] == {"value": -0.09, "low": -0.31, "high": 0.12}
    assert ladder["verdict"]["first_lossy_rung"] is None
    assert ladder["verdict"]["sentence"] == (
        "None of the 4 measured steps loses more than its gates allow. The largest loss of AP is −0.090 at torch, "
        "fixed canvas (95 % interval −0.310 to 0.120). Not run: TensorRT."
    )
    page, markdown = written(report, run_dir)
    for text in (read_page(page).text, markdown):
        assert ladder["verdict"]["sentence"] in text
        assert "98.25 %" in text
        assert "whale & <calf>" in text
        assert "class logits" in text
    assert "| −0.090 [−0.31, +0.12] |" in markdown


def test_the_ladders_verdict_names_the_first_rung_that_failed_a_gate(manifests: Any, run_dir: Path) -> None:
    for gate in manifests["validate"]["gates"][:2]:
        gate["passed"] = False
    manifests["deploy"]["gates"][0]["passed"] = False
    report = report_of(run_dir, manifests)
    verdict = report["ladder"]["verdict"]
    assert verdict["first_lossy_rung"] == "ONNX Runtime"
    assert verdict["sentence"].startswith("First lossy step: ONNX Runtime, made from torch, fixed canvas: AP drop")
    failed = [row["name"] for row in report["ladder"]["rows"] if row["status"] == "failed"]
    assert failed == ["ONNX Runtime", "Triton, concurrency 8"]


def test_a_picture_of_an_image_that_changed_is_in_the_page_and_linked_from_the_markdown(
    manifests: Any, run_dir: Path
) -> None:
    (run_dir / "validate").mkdir()
    Image.new("RGB", (60, 20), (200, 30, 30)).save(run_dir / "validate" / "changed_torch_fixed_canvas_7.jpg")
    page, markdown = written(report_of(run_dir, manifests), run_dir)
    (picture,) = read_page(page).images
    assert str(picture["src"]).startswith("data:image/jpeg;base64,")
    assert picture["alt"] == (
        "Image 7 with the detections of detectron2 on the left and of torch, fixed canvas on the right"
    )
    (link,) = re.findall(r"!\[image 7\]\((.*?)\)", markdown)
    assert (run_dir / "report" / link).is_file()


def test_masks_have_columns_of_their_own_on_the_ladder(manifests: Any, run_dir: Path) -> None:
    row = manifests["validate"]["facts"]["rows"][2]
    row.update(segm_AP=21.75)
    row["differences"]["segm_AP"] = {"value": -0.375, "low": -0.5, "high": -0.25}
    row["agreement"].update(mask_iou_p01=0.8125, mask_iou_p50=0.9875)
    page, markdown = written(report_of(run_dir, manifests), run_dir)
    for text in (read_page(page).text, markdown):
        assert "−0.375" in text
        assert "0.8125 / 0.9875" in text
    test_every_table_of_the_markdown_is_rectangular(manifests, run_dir)


def test_the_engine_names_the_architectures_it_could_not_be_built_for(manifests: Any, run_dir: Path) -> None:
    page, markdown = written(report_of(run_dir, manifests), run_dir)
    assert "not built for 12.0 needs 1.2 GB | more than it has" in read_page(page).text
    assert "not built for compute capability 12.0: needs 1.2 GB \\| more than it has" in markdown


def test_the_engine_says_its_batches_and_whose_timings_it_used(manifests: Any, run_dir: Path) -> None:
    manifests["engine"]["facts"] |= {"gpu": "NVIDIA L4", "timing_cache": "began empty: warning: damaged"}
    page, markdown = written(report_of(run_dir, manifests), run_dir)
    text = read_page(page).text
    assert "batches: smallest, tuned for, largest 1, 4, 8 built on NVIDIA L4" in text
    assert "timing cache began empty: warning: damaged" in text
    assert "batches 1, 4, 8 (smallest, tuned for, largest), built on NVIDIA L4, compute capabilities" in markdown
    assert "Timing cache: began empty: warning: damaged." in markdown


def with_teacher(manifests: dict[str, Any], *teacher_aps: float) -> None:
    points = [
        {"iteration": 3000 * i, "fraction": float(i), "AP": ap, "AP50": ap + 9} for i, ap in enumerate(teacher_aps)
    ]
    manifests["train"]["facts"]["teacher_ap_curve"] = points


def baseline_of(manifests: dict[str, Any], **changes: Any) -> Baseline:
    curve = [{**point, "AP": point["AP"] / 2} for point in manifests["train"]["facts"]["ap_curve"]]
    known = {key: {} for key in ("inputs", "config", "environment", "machine", "files")}
    train = Manifest(
        stage="train", stage_version=1, fingerprint="ba5e", facts={"ap_curve": curve}, gates=[], seconds=1.0,
        command="python -m pipeline run embedded distiller=none", started="s", finished="f", **known,
    )  # fmt: skip
    settings: dict[str, Any] = {"run_dir": Path("runs/plain"), "train": train, "seed": 0, "same_seed": True}
    return Baseline(**{**settings, **changes})


def test_the_panel_puts_student_baseline_and_implicit_teacher_side_by_side(manifests: Any, run_dir: Path) -> None:
    with_teacher(manifests, 1.0, 61.5)
    report = report_of(run_dir, manifests, baseline=baseline_of(manifests))
    panel = {row["who"].split()[0]: row for row in report["teacher_panel"]["rows"]}
    assert [(who, row["AP"], row["AP50"]) for who, row in panel.items()] == [
        ("student", 25.0, 40.0),
        ("baseline", 12.5, 40.0),
        ("implicit", 61.5, 70.5),
    ]
    assert [row["difference_to_student"] for row in panel.values()] == [None, -12.5, 36.5]
    assert panel["baseline"]["run"] == "runs/plain"
    page, markdown = written(report, run_dir)
    for text in (read_page(page).text, markdown):
        assert "sanity check that labels help, never a model that ships" in text
        assert "61.50" in text
        assert "+36.50" in text
    curves = charts(report)["ap_curve"]
    for line in ("AP, baseline", "AP, implicit teacher"):
        assert line in curves
        assert line not in charts(report_of(run_dir, manifests | {"train": {"facts": {}}}))["ap_curve"]


def test_a_baseline_that_was_not_trained_says_so_with_the_command(manifests: Any, run_dir: Path) -> None:
    command = "python -m pipeline run embedded distiller=none --name embedded-baseline --until train"
    report = report_of(run_dir, manifests, baseline_command=command)
    rows = {row["who"].split()[0]: row for row in report["teacher_panel"]["rows"]}
    assert (rows["baseline"]["status"], rows["baseline"]["command"]) == ("not run", command)
    assert (rows["implicit"]["status"], rows["implicit"]["reason"]) == ("not run", "this training did not measure it")
    assert "not run" not in rows["student"]["status"]
    for text in written(report, run_dir):
        assert command in text


def test_a_baseline_of_another_seed_is_marked(manifests: Any, run_dir: Path) -> None:
    report = report_of(run_dir, manifests, baseline=baseline_of(manifests, seed=4, same_seed=False))
    row = report["teacher_panel"]["rows"][1]
    assert (row["status"], row["AP"]) == ("available", 12.5)
    assert row["reason"].startswith("of another seed, 4")


def test_a_run_without_a_distiller_has_no_panel_and_says_why(manifests: Any, run_dir: Path) -> None:
    manifests["train"]["config"] = {"distiller": {"_target_": "training.distillers.none.NoDistillerConfig"}}
    report = report_of(run_dir, manifests)
    assert report["distillation"]["distiller"] == "none"
    assert report["teacher_panel"]["rows"] == []
    for text in written(report, run_dir):
        assert "trained without a distiller, so this student is a baseline itself" in text


def test_metrics_beyond_cocos_are_shown_where_there_are_any(manifests: Any, run_dir: Path) -> None:
    manifests["validate"]["facts"]["rows"][1].update(mMR=43.21, segm_AP=21.75, num_images=400)
    manifests["train"]["facts"]["ap_curve"][-1].update(mMR=44.5)
    with_teacher(manifests, 1.0, 61.5)
    report = report_of(run_dir, manifests)
    found = report["accuracy"]["extra_metrics"]
    assert [(m["key"], m["label"], m["lower_is_better"]) for m in found] == [
        ("mMR", "MR⁻² (lower is better)", True),
        ("segm_AP", "mask AP", False),
    ]
    page, markdown = written(report, run_dir)
    assert "lower is better" in read_page(page).text
    for text in (page, markdown):
        for value in ("43.21", "21.75", "44.50"):
            assert value in text
    test_every_table_of_the_markdown_is_rectangular(manifests, run_dir)
    test_the_page_stands_alone_with_unique_ids_and_described_images(manifests, run_dir)


def test_a_metric_is_told_from_other_facts_by_its_name() -> None:
    named = {"AP", "AP50", "APs", "AR100", "mMR", "VOC_AP50", "VOC_AP50_area", "CrowdHuman_recall", "segm_APl", "JI"}
    assert {
        key for key in (*named, "AP-crab", "delta", "size_bytes", "MAP_bytes", "num_images") if is_metric(key)
    } == named
    assert [label_of(key) for key in ("VOC_AP50_area", "segm_AP75", "CrowdHuman_recall")] == [
        "VOC AP50, area under curve",
        "mask AP75",
        "CrowdHuman recall",
    ]
