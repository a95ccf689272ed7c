"""Deliberate faults: the ladder fails at the rung that has the fault, and the bisection names a node inside it."""

from __future__ import annotations

import copy
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from rich.console import Console

from export import detector_graph
from export import precision as conversion
from export.dense_graph import DenseGraph, dense_settings, retinanet_graph
from export.detector_graph import Family
from export.precision import write_typed_onnx
from export.runners import OnnxRuntimeRunner
from pipeline import bisection
from pipeline.bisection import BISECTION_FILE, Bisection, bisect, bisecting
from pipeline.errors import GateFailed
from pipeline.export_stages import GRAPH
from pipeline.model_files import ONNX_RUNTIME
from pipeline.stage import StageContext, StageResult
from tests import graph_faults as faults
from tests.pipeline.ladder_run import CERTAIN, CLASS_NAMES, NMS_THRESHOLD, Sound, run_of
from tests.pipeline.ladder_run import sound as sound_run

STAND_IN = Path(__file__).parents[1] / "stand_in"
LOWERED = NMS_THRESHOLD - 0.2
IN_TORCH = {
    "BGR for RGB": (faults.swap_channels, "normalised image"),
    "mean doubled": (faults.double_mean, "normalised image"),
    "anchors shifted by half a cell": (faults.shift_anchors, "anchors of level 0"),
    "one level dropped": (faults.drop_level, "head"),
    "fp16 decode": (faults.decode_in_half, "decoder"),
    "batch baked to 1": (faults.bake_batch_in_torch, "normalised image"),
    "NMS threshold": (faults.change_nms_threshold, "NMS"),
    "class order": (faults.reverse_classes, "decoder"),
}
IN_FILE: dict[str, Callable[[onnx.ModelProto], str]] = {
    "BGR for RGB": faults.swap_channels_of_file,
    "mean doubled": faults.double_mean_of_file,
    "anchors shifted by half a cell": faults.shift_anchors_of_file,
    "one level dropped": faults.drop_level_of_file,
    "fp16 decode": faults.decode_file_in_half,
    "batch baked to 1": faults.bake_batch,
    "NMS threshold": functools.partial(faults.change_nms_threshold_of_file, threshold=NMS_THRESHOLD, changed=LOWERED),
    "class order": functools.partial(faults.reverse_classes_of_file, num_classes=len(CLASS_NAMES)),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return sound_run(tmp_path_factory.mktemp("sound"))


@pytest.fixture(autouse=True)
def one_export(sound: Sound, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh export of a sound student is always the same; one is made for all tests."""
    monkeypatch.setattr(bisection, "traced_onnx", lambda *_, **__: copy.deepcopy(sound.traced))


def bisected(sound: Sound, run_dir: Path) -> tuple[Bisection, str]:
    """The result and what is printed."""
    output = io.StringIO()
    result = bisect(sound.recipe, run_dir, Console(file=output, soft_wrap=True, highlight=False))
    return result, output.getvalue()


def verdict(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "validate" / "manifest.json").read_text())


def failed_gates(run_dir: Path, rung: str) -> list[str]:
    """Those of the rung that failed."""
    manifest = verdict(run_dir)
    (row,) = [row for row in manifest["facts"]["rows"] if row["name"] == rung]
    return [gate["name"] for gate in manifest["gates"] if gate["name"] in row["gates"] and not gate["passed"]]


def test_a_sound_run_passes_and_no_node_departs(sound: Sound, tmp_path: Path) -> None:
    assert run_of(sound, tmp_path / "run") is None
    rows = verdict(tmp_path / "run")["facts"]["rows"]
    assert [round(row["AP"]) for row in rows if row["status"] == "passed"] == [100] * 4
    matching = verdict(tmp_path / "run")["facts"]["matching"]
    assert matching["num_matched"] > 200
    result, printed = bisected(sound, tmp_path / "run")
    assert (result.first_lossy_rung, result.rung, result.departure) == (None, None, None)
    assert len(result.compared) == 4
    assert "no node departs on 3 images" in printed
    written = json.loads((tmp_path / "run" / BISECTION_FILE).read_text())
    assert written["departure"] is None
    exported = json.loads((tmp_path / "run" / "export" / "manifest.json").read_text())
    assert written["files"]["export/model.onnx"] == exported["files"]["model.onnx"]["sha256"]


@pytest.mark.parametrize("name", IN_TORCH)
def test_a_fault_in_the_graph_fails_at_the_graph_and_its_place_is_named(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fault, place = IN_TORCH[name]

    def broken(*arguments: Any) -> DenseGraph:
        graph = retinanet_graph(*arguments)
        fault(graph)
        return graph

    monkeypatch.setitem(detector_graph.FAMILIES, RetinaNet, Family(broken, dense_settings))
    assert run_of(sound, tmp_path / "run") == "validate"
    assert verdict(tmp_path / "run")["facts"]["first_lossy_rung"] == GRAPH
    seen_in = "head tensors" if name == "one level dropped" else "detections"  # nothing is found on that level
    assert any(gate.startswith(f"{seen_in} of {GRAPH}") for gate in failed_gates(tmp_path / "run", GRAPH))
    result, printed = bisected(sound, tmp_path / "run")
    assert (result.first_lossy_rung, result.rung) == (GRAPH, GRAPH)
    assert result.departure is not None
    assert result.departure.node == place
    assert result.departure.batch_size == (2 if name == "batch baked to 1" else 1)
    assert f"at the rung '{GRAPH}':\n  {place} (" in printed


@pytest.mark.parametrize("name", IN_FILE)
def test_a_fault_in_the_exported_file_fails_at_onnx_runtime_and_its_node_is_named(
    sound: Sound, tmp_path: Path, name: str
) -> None:
    node = IN_FILE[name](copy.deepcopy(sound.exported))
    assert run_of(sound, tmp_path / "run", file_fault=IN_FILE[name]) == "validate"
    assert verdict(tmp_path / "run")["facts"]["first_lossy_rung"] == ONNX_RUNTIME
    assert failed_gates(tmp_path / "run", ONNX_RUNTIME)
    result, printed = bisected(sound, tmp_path / "run")
    assert (result.first_lossy_rung, result.rung) == (ONNX_RUNTIME, ONNX_RUNTIME)
    assert result.departure is not None
    assert result.departure.node == node
    assert node in printed
    written = json.loads((tmp_path / "run" / BISECTION_FILE).read_text())
    assert written["departure"]["node"] == node
    assert written["departure"]["operator"] == result.departure.operator


def test_a_fault_that_raises_ap_fails_all_the_same(sound: Sound, tmp_path: Path) -> None:
    faulty = copy.deepcopy(sound.exported)
    IN_FILE["class order"](faulty)
    onnx.save(faulty, tmp_path / "faulty.onnx")
    with OnnxRuntimeRunner(tmp_path / "faulty.onnx", sound.signature) as runner:
        truth = [runner.run(image[None])[0].above(CERTAIN) for image in sound.images]
    assert run_of(sound, tmp_path / "run", file_fault=IN_FILE["class order"], truth=truth) == "validate"
    facts = verdict(tmp_path / "run")["facts"]
    assert facts["first_lossy_rung"] == ONNX_RUNTIME
    (row,) = [row for row in facts["rows"] if row["name"] == ONNX_RUNTIME]
    assert row["differences"]["AP"]["value"] > 50
    failed = failed_gates(tmp_path / "run", ONNX_RUNTIME)
    assert "detections of ONNX Runtime without a partner in those of torch, fixed canvas" in failed
    assert not any(gate.startswith("AP of") for gate in failed)


def drop_level_of_trunk(model: onnx.ModelProto) -> str:
    """The finest level of a converted file is zero; the exported file's node that makes it."""
    name = next(t.name for t in model.graph.initializer if t.name.endswith("detector.backbone.fpn_output3.weight"))
    faults.set_constant(model, name, np.zeros_like)
    return next(node.name for node in model.graph.node if name in node.input)


@pytest.mark.parametrize("fault", [None, faults.decode_file_in_half, drop_level_of_trunk], ids=["no", "fp16", "trunk"])
def test_decoding_of_a_converted_file_in_half_precision_fails_at_its_rung_and_a_lossy_trunk_is_told_apart(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[onnx.ModelProto], str] | None
) -> None:
    monkeypatch.setattr(conversion, "MODELOPT", STAND_IN)
    named: list[str | None] = []

    def converted(context: StageContext) -> StageResult:
        path = context.directory / "model.onnx"
        write_typed_onnx(context.inputs["export"].path("model.onnx"), path, "fp16", np.stack(sound.images))
        model = onnx.load(path)
        named.append(None if fault is None else fault(model))
        onnx.save(model, path)
        return StageResult(facts={"precision": "fp16"})

    rung = f"{ONNX_RUNTIME}, fp16"
    stage = run_of(sound, tmp_path / "run", precision=converted)
    assert stage == (None if fault is None else "validate")
    assert verdict(tmp_path / "run")["facts"]["first_lossy_rung"] == (None if fault is None else rung)
    tail = [gate for gate in verdict(tmp_path / "run")["gates"] if "decoding and NMS" in gate["name"]]
    assert [(rung in gate["name"], gate["passed"]) for gate in tail] == [
        (True, fault is not faults.decode_file_in_half)
    ]
    result, printed = bisected(sound, tmp_path / "run")
    assert (result.rung, result.departure and result.departure.node) == (fault and rung, named[0]), printed
    assert ("float16, not in float32" in printed) == (fault is faults.decode_file_in_half)
    assert ("the trunk loses most here" in printed) == (fault is drop_level_of_trunk)


@pytest.mark.parametrize(("stage", "is_looked_into"), [("validate", True), ("export", True), ("strip", False)])
def test_a_failed_gate_is_bisected_and_raised_again(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, is_looked_into: bool
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(bisection, "bisect", lambda recipe, run_dir, console: seen.append(run_dir))
    with pytest.raises(GateFailed), bisecting(sound.recipe, tmp_path, Console()):
        raise GateFailed(stage, [])
    assert seen == [tmp_path] * is_looked_into
    with bisecting(sound.recipe, tmp_path, Console()):
        pass
    assert seen == [tmp_path] * (1 + is_looked_into)
