"""The first node that departs, on graphs of a few nodes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.onnx_departure import ReferenceFails, onnx_departure

FEEDS = {"x": np.arange(12, dtype=np.float32).reshape(2, 6) - 4}


def model_of(*nodes: onnx.NodeProto, **constants: np.ndarray) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def node(operator: str, reads: Sequence[str], makes: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, reads, [makes], name=f"node {makes}", **attributes)


@pytest.fixture
def sound() -> ModelProto:
    return model_of(
        node("Sub", ["x", "mean"], "centred"),
        node("Relu", ["centred"], "positive"),
        node("Mul", ["centred", "two"], "scaled"),
        node("Reshape", ["scaled", "shape"], "pairs"),
        node("ReduceSum", ["pairs", "last"], "sums", keepdims=0),
        node("Reshape", ["positive", "shape"], "positive pairs"),
        node("ReduceMax", ["positive pairs", "last"], "largest", keepdims=0),
        node("Add", ["sums", "largest"], "y"),
        mean=np.array(1.5, np.float32),
        two=np.array(2, np.float32),
        shape=np.array([-1, 3, 2]),
        last=np.array([2]),
    )


def renamed(model: ModelProto) -> ModelProto:
    """As another version of the exporter might name it."""
    other = copy.deepcopy(model)
    kept = {"x", "y"}
    for part in other.graph.node:
        part.name = part.name.replace("node", "n")
        for names in (part.input, part.output):
            names[:] = [name if name in kept else f"value_{name}" for name in names]
    for tensor in other.graph.initializer:
        tensor.name = f"value_{tensor.name}"
    return other


def change(model: ModelProto, name: str, value: np.ndarray) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(name))
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


@pytest.mark.parametrize("rename", [False, True], ids=["names alike", "other names"])
def test_the_same_graph_does_not_depart(sound: ModelProto, rename: bool) -> None:
    assert onnx_departure(renamed(sound) if rename else sound, sound, FEEDS) is None


@pytest.mark.parametrize("rename", [False, True], ids=["names alike", "other names"])
def test_a_changed_constant_is_found_at_the_node_that_reads_it_and_told(sound: ModelProto, rename: bool) -> None:
    broken = renamed(sound) if rename else copy.deepcopy(sound)
    change(broken, "two", np.array(3, np.float32))
    found = onnx_departure(broken, sound, FEEDS)
    assert found is not None
    assert found.node.endswith("scaled")
    assert (found.operator, found.batch_size, found.others) == ("Mul", 2, ())
    if not rename:
        assert found.reason == "its constant 'two' is [3], [2] in a fresh export"
        assert found.max_abs_error == pytest.approx(0.5 * found.max_abs_value)


def test_a_node_that_makes_a_value_which_is_right_elsewhere_is_found_by_its_name(sound: ModelProto) -> None:
    broken = copy.deepcopy(sound)
    broken.graph.node[1].op_type = "Identity"  # makes what is there already
    found = onnx_departure(broken, sound, FEEDS)
    assert found is not None
    assert (found.node, found.reason) == ("node positive", "a fresh export has no such node")


def test_what_is_undone_again_or_changes_nothing_does_not_depart(sound: ModelProto) -> None:
    other = copy.deepcopy(sound)
    there, back = (node("Transpose", [a], b, perm=[1, 0]) for a, b in (("centred", "turned"), ("turned", "again")))
    other.graph.node.insert(1, there)
    other.graph.node.insert(2, back)
    other.graph.node[3].input[0] = "again"
    assert onnx_departure(other, sound, FEEDS) is None
    change(other, "last", np.array([1]))  # of both sums: each departs, and neither because of the other
    other.graph.initializer.append(numpy_helper.from_array(np.array([2]), "last again"))
    found = onnx_departure(other, sound, FEEDS)
    assert found is not None
    assert (found.node, found.others) == ("node sums", ("node largest",))
    assert "its constant 'last' is [1], [2] in a fresh export" in found.reason
    assert "the result has shape (2, 2), in a fresh export (2, 3)" in found.reason
    assert found.max_abs_error is None


def test_attributes_and_inputs_that_differ_are_told(sound: ModelProto) -> None:
    broken = copy.deepcopy(sound)
    broken.graph.node[6].input[0] = "pairs"
    found = onnx_departure(broken, sound, FEEDS)
    assert found is not None
    assert (found.node, found.reason) == ("node largest", "a fresh export reads positive pairs, last here")
    broken = copy.deepcopy(sound)
    broken.graph.node[4].attribute[0].i = 1
    found = onnx_departure(broken, sound, FEEDS)
    assert found is not None
    assert found.node == "node sums"
    assert "attributes {'keepdims': 1}, in a fresh export {'keepdims': 0}" in found.reason


def test_the_node_that_does_not_run_is_named_or_the_one_that_makes_it_fail(sound: ModelProto) -> None:
    broken = copy.deepcopy(sound)
    change(broken, "shape", np.array([1, 3, 2]))
    found = onnx_departure(broken, sound, FEEDS)
    assert found is not None
    assert found.node == "node pairs"
    assert "ONNX Runtime does not run it in a batch of 2" in found.reason
    assert onnx_departure(broken, sound, {"x": FEEDS["x"][:1]}) is None
    broken = copy.deepcopy(sound)
    broken.graph.initializer.append(numpy_helper.from_array(np.array([1, -1, 2]), "baked"))
    broken.graph.node[3].input[1] = "baked"  # runs, and what reads it fails later
    found = onnx_departure(broken, sound, FEEDS)
    assert found is not None
    assert found.node == "node pairs"
    assert "the result has shape (1, 6, 2), in a fresh export (2, 3, 2)" in found.reason


def test_a_reference_that_does_not_run_is_refused(sound: ModelProto) -> None:
    broken = copy.deepcopy(sound)
    change(broken, "shape", np.array([1, 3, 2]))
    with pytest.raises(ReferenceFails, match="what the file is compared with"):
        onnx_departure(sound, broken, FEEDS)
