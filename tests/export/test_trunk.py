"""A graph is the same with its trunk taken out and put back; what decodes and chooses is never in the trunk."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.detector_graph import detector_graph
from export.targets.onnx_target import export_onnx
from export.trunk import CHOICES, COMPUTE, outermost, subgraphs_of, tail_nodes, trunk_nodes, trunk_of, with_trunk
from tests.export.conftest import Exported, canvases, signature_for
from tests.export.tiny_two_stage import calibrated_rcnn


def outputs_of(model: ModelProto, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


@pytest.fixture
def model(exported: Exported) -> ModelProto:
    return onnx.load(exported.path)


@pytest.fixture
def images(exported: Exported) -> np.ndarray:
    return np.stack(canvases(*exported.signature.image_shape[1:], 3))


def test_the_trunk_holds_every_convolution_of_a_dense_detector_and_no_choice(model: ModelProto) -> None:
    trunk, tail = trunk_nodes(model.graph), tail_nodes(model.graph)
    assert len(trunk) + len(tail) == len(model.graph.node)
    assert {node.name for node in trunk}.isdisjoint(node.name for node in tail)
    assert not {node.op_type for node in tail} & COMPUTE
    assert not {node.op_type for node in trunk} & (CHOICES | {"Exp", "Sigmoid"}), "decoding is not in the trunk"


def test_taken_out_and_put_back_the_graph_gives_the_same_bits(model: ModelProto, images: np.ndarray) -> None:
    before, after = outputs_of(model, images), outputs_of(with_trunk(model, trunk_of(model)), images)
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name], name)
    assert before["num_detections"].min() > 0


def test_the_trunk_alone_gives_what_the_heads_give_inside_the_graph(model: ModelProto, images: np.ndarray) -> None:
    trunk = trunk_of(model)
    marked = copy.deepcopy(model)
    marked.graph.output.extend(trunk.graph.output)
    inside, alone = outputs_of(marked, images), outputs_of(trunk, images)
    assert len(alone) == 10, "classes and boxes on five levels"
    for name, values in alone.items():
        np.testing.assert_allclose(values, inside[name], atol=1e-5)


def test_the_tail_comes_back_node_by_node_and_copies_of_a_constant_become_one(model: ModelProto) -> None:
    trunk = trunk_of(model)
    stored = {tensor.name: tensor for tensor in trunk.graph.initializer}
    for node in trunk.graph.node:  # as conversions do with the heads' weights, which every level shares
        if node.op_type == "Conv":
            own = copy.deepcopy(stored[node.input[1]])
            own.name = node.input[1] = f"{node.name} alone"
            trunk.graph.initializer.append(own)
    joined = with_trunk(model, trunk)
    assert tail_nodes(joined.graph) == tail_nodes(model.graph)
    assert len(joined.graph.initializer) == len(model.graph.initializer)
    assert joined.ByteSize() < 1.01 * model.ByteSize()


def test_first_layers_read_more_than_a_quarter_of_the_resolution_and_last_ones_feed_the_tail(model: ModelProto) -> None:
    weights = {node.name: node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    found = [(weights[name], why) for name, why in outermost(model).items()]
    assert found[0] == ("detector.backbone.bottom_up.stem.conv1.weight", "first layers")
    assert sorted(found[1:]) == sorted(
        [(f"detector.head.{name}.weight", "last layers") for name in ("cls_score", "bbox_pred")] * 5
    )
    assert outermost(trunk_of(model)) == outermost(model)


def test_the_second_stage_belongs_to_the_tail(tmp_path: Path) -> None:
    detector = calibrated_rcnn(masks=True)
    signature = signature_for(detector, 128, 192)
    export_onnx(detector_graph(detector, signature), signature, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    inner = [node for outer in tail_nodes(model.graph) for graph in subgraphs_of(outer) for node in graph.node]
    late = {node.op_type for node in [*tail_nodes(model.graph), *inner]}
    assert {"Gemm", "MatMul", "ConvTranspose"} <= late, "box and mask heads"
    assert {node.op_type for node in trunk_nodes(model.graph)} & COMPUTE == {"Conv"}


def test_a_newer_operator_set_of_the_trunk_takes_the_tail_along(model: ModelProto, images: np.ndarray) -> None:
    newer = onnx.version_converter.convert_version(trunk_of(model), 22)
    joined = with_trunk(model, newer)
    assert [entry.version for entry in joined.opset_import] == [22]
    np.testing.assert_array_equal(outputs_of(joined, images)["scores"], outputs_of(model, images)["scores"])


def test_names_inside_a_converted_trunk_may_be_names_of_the_tail(model: ModelProto, images: np.ndarray) -> None:
    trunk = trunk_of(model)
    own = {tensor.name for tensor in trunk.graph.initializer}
    taken = next(tensor.name for tensor in model.graph.initializer if tensor.name not in own)
    weight = next(tensor for tensor in trunk.graph.initializer if len(tensor.dims) == 4)
    for node in trunk.graph.node:
        node.input[:] = [taken if name == weight.name else name for name in node.input]
    weight.name = taken
    found = outputs_of(with_trunk(model, trunk), images)
    np.testing.assert_array_equal(found["boxes"], outputs_of(model, images)["boxes"])


def two_maps() -> ModelProto:
    """A pyramid in small: the tail reads what the first convolution gives, and so does the second one."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["pixels", "w"], ["map"], name="first"),
        helper.make_node("Conv", ["map", "w"], ["logits"], name="second"),
        helper.make_node("Sqrt", ["map"], ["pooled"]),
        helper.make_node("Sqrt", ["logits"], ["scores"]),
    ]
    shape = [1, 3, 4, 4]
    weight = numpy_helper.from_array(np.full((3, 3, 1, 1), 0.07, np.float32), "w")
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, shape)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("pooled", "scores")]
    graph = helper.make_graph(nodes, "two maps", [images], ends, [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_what_a_layer_reads_rounded_the_tail_reads_as_it_was_before() -> None:
    model = two_maps()
    trunk = trunk_of(model)
    first, second = trunk.graph.node[1:3]
    first.output[0] = "raw"
    qdq = [
        helper.make_node("QuantizeLinear", ["raw", "scale", "zero"], ["stored"], name="q"),
        helper.make_node("DequantizeLinear", ["stored", "scale", "zero"], ["map"], name="dq"),
    ]
    nodes = [trunk.graph.node[0], first, *qdq, second]
    del trunk.graph.node[:]
    trunk.graph.node.extend(nodes)
    for name, value in (("scale", np.float32(8)), ("zero", np.int8(0))):
        trunk.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    images = np.arange(48, dtype=np.uint8).reshape(1, 3, 4, 4)
    exact, rounded = outputs_of(model, images), outputs_of(with_trunk(model, trunk), images)
    np.testing.assert_array_equal(rounded["pooled"], exact["pooled"])
    assert not np.allclose(rounded["scores"], exact["scores"], rtol=0.01)
