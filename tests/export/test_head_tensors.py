"""Head tensors of detectron2, of the export graph and of the exported file, level by level."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from torch import Tensor

from export.detector_graph import detector_graph
from export.graph_parts import DetectorGraph, Outputs
from export.head_tensors import (
    HeadTensors,
    detectron2_head_tensors,
    graph_head_tensors,
    head_differences,
    onnx_head_tensors,
)
from tests.dense_detectors import DENSE
from tests.export.conftest import CLASS_NAMES, Exported, canvases, signature_for
from tests.export.tiny_two_stage import calibrated_rcnn

RETINANET = ("class_logits", "box_deltas")
TENSORS = {
    "FCOS": ("class_logits", "box_distances", "centerness"),
    "PaperFCOS": ("class_logits", "edge_values", "centerness"),
    "GFL": ("class_logits", "edge_values"),
    "DistributionRetinaNet": ("class_logits", "edge_values"),
}


def images_of(exported: Exported, num_images: int = 2) -> list[np.ndarray]:
    return canvases(exported.signature.canvas_height, exported.signature.canvas_width, num_images)


def test_the_three_rungs_agree_on_every_tensor_and_level(exported: Exported) -> None:
    rungs: dict[str, HeadTensors] = {
        "detectron2": detectron2_head_tensors(exported.detector, exported.graph),
        "graph": graph_head_tensors(exported.graph),
        "file": onnx_head_tensors(exported.path),
    }
    rows = head_differences(rungs, images_of(exported))
    expected = {(rung, tensor, level) for rung in ("graph", "file") for tensor in RETINANET for level in range(5)}
    assert {(row.rung, row.tensor, row.level) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row.compared_with == {"graph": "detectron2", "file": "graph"}[row.rung]
        assert 0 <= row.mean_abs_error <= row.max_abs_error < 1e-4 * row.max_abs_value


def test_errors_are_those_of_the_arrays_over_all_canvases() -> None:
    values = {1: np.array([[1.0, -4.0]]), 2: np.array([[2.0, 3.0]])}

    def before(canvas: np.ndarray) -> dict[str, np.ndarray]:
        return {"head/a/0": values[int(canvas)], "head/b/3": values[int(canvas)]}

    def after(canvas: np.ndarray) -> dict[str, np.ndarray]:
        return {"head/a/0": values[int(canvas)] + np.array([[0.5, 0.0]]) * canvas}

    (row,) = head_differences({"x": before, "y": after}, [np.array(1), np.array(2)])
    assert (row.rung, row.compared_with, row.tensor, row.level) == ("y", "x", "a", 0)
    assert (row.max_abs_error, row.mean_abs_error, row.max_abs_value) == (1.0, 0.375, 4.0)


def test_a_level_of_another_size_counts_as_wholly_wrong() -> None:
    small, large = {"head/a/0": np.array([[3.0, 1.0]])}, {"head/a/0": np.array([[3.0, -5.0, 1.0]])}
    (row,) = head_differences({"x": lambda _: large, "y": lambda _: small}, [np.array(1)])
    assert (row.max_abs_error, row.mean_abs_error, row.max_abs_value) == (5.0, 3.0, 5.0)


@pytest.mark.parametrize("family", TENSORS)
def test_every_dense_family_names_its_tensors(family: str) -> None:
    detector = DENSE[family](len(CLASS_NAMES))
    graph = detector_graph(detector, signature_for(detector, 64, 96))
    rungs = {"detectron2": detectron2_head_tensors(detector, graph), "graph": graph_head_tensors(graph)}
    rows = head_differences(rungs, canvases(64, 96, 1))
    assert {(row.tensor, row.level) for row in rows} == {
        (name, level) for name in TENSORS[family] for level in range(5)
    }
    assert max(row.max_abs_error for row in rows) < 1e-4


def test_a_two_stage_detector_gives_those_of_its_proposals() -> None:
    detector = calibrated_rcnn(masks=True)
    graph = detector_graph(detector, signature_for(detector, 64, 96))
    rungs = {"detectron2": detectron2_head_tensors(detector, graph), "graph": graph_head_tensors(graph)}
    rows = head_differences(rungs, canvases(64, 96, 1))
    assert {row.tensor for row in rows} == {"objectness_logits", "anchor_deltas"}
    assert all(row.max_abs_error < 1e-4 * row.max_abs_value for row in rows)


def test_the_file_that_ships_has_the_signatures_outputs_alone(exported: Exported) -> None:
    before = exported.path.read_bytes()
    onnx_head_tensors(exported.path)(images_of(exported, 1)[0])
    assert exported.path.read_bytes() == before
    outputs = [output.name for output in onnx.load(exported.path).graph.output]
    assert outputs == list(exported.signature.output_names)


def test_a_file_that_has_lost_the_names_has_nothing_to_compare(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported.path)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("head/", "trunk/head/") for name in names]
    onnx.save(model, tmp_path / "renamed.onnx")
    assert onnx_head_tensors(tmp_path / "renamed.onnx", optimize=False)(images_of(exported, 1)[0]) == {}


class _Swapped(DetectorGraph):
    """The graph with the channels in the wrong order."""

    def __init__(self, graph: DetectorGraph) -> None:
        super().__init__()
        self.inner = graph

    def with_head_tensors(self, images: Tensor) -> tuple[Outputs, dict[str, Tensor]]:
        return self.inner.with_head_tensors(images.flip(1))


class _DoubledMean(DetectorGraph):
    """The graph with the mean subtracted twice."""

    def __init__(self, graph: DetectorGraph) -> None:
        super().__init__()
        self.inner = copy.deepcopy(graph)
        self.inner.mean.mul_(2)

    def with_head_tensors(self, images: Tensor) -> tuple[Outputs, dict[str, Tensor]]:
        return self.inner.with_head_tensors(images)


@pytest.mark.parametrize("broken", [_Swapped, _DoubledMean])
def test_a_fault_before_the_head_shows_on_every_level_of_the_graph_and_not_after_it(
    exported: Exported, broken: Callable[[torch.nn.Module], DetectorGraph]
) -> None:
    graph = broken(exported.graph)
    rungs = {
        "detectron2": detectron2_head_tensors(exported.detector, exported.graph),
        "graph": graph_head_tensors(graph),
        "graph again": graph_head_tensors(graph),
    }
    rows = head_differences(rungs, images_of(exported))
    for row in rows:
        if row.rung == "graph":
            assert row.max_abs_error > 1e-2 * row.max_abs_value
        else:
            assert row.max_abs_error == 0


def test_a_weight_that_changed_in_the_file_shows_at_the_file(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported.path)
    damaged = next(t for t in model.graph.initializer if t.name.endswith("head.bbox_pred.weight"))
    damaged.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(damaged), damaged.name))
    path = tmp_path / "damaged.onnx"
    path.write_bytes(model.SerializeToString())
    rungs = {"graph": graph_head_tensors(exported.graph), "file": onnx_head_tensors(path)}
    rows = head_differences(rungs, images_of(exported))
    errors = {(row.tensor, row.level): row.max_abs_error / row.max_abs_value for row in rows}
    for level in range(5):
        assert errors["class_logits", level] < 1e-4
        assert errors["box_deltas", level] > 0.05
