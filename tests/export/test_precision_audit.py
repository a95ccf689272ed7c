"""A graph that does not compute in the precision asked for, or decodes in less than float32, is named and refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.precision_audit import (
    PrecisionMismatch,
    check_float32_tail,
    check_precision,
    compute_layers,
    num_layers_by_type,
)
from tests.export.conftest import Exported


def model_of(nodes: list[NodeProto], initializers: dict[str, np.ndarray]) -> ModelProto:
    """A model that reads ``x`` (1, 32, 16, 16) float32 and gives ``y``."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "channels", 4, 4])],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def cast(source: str, target: str, to: int = TensorProto.FLOAT) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_to_{target}", to=to)


def convolution(source: str, target: str, weight: str) -> NodeProto:
    """The first one brings the image down to a quarter of its resolution."""
    stride = 4 if source in ("x", "in0") else 1
    return helper.make_node("Conv", [source, weight], [target], name=f"conv_{target}", strides=[stride, stride])


def chain(types: list[type], channels: list[int] | None = None) -> ModelProto:
    """1 x 1 convolutions one after another, each of a type, then what stands for decoding."""
    widths = [32, *(channels or [32] * len(types))]
    nodes, weights, source = [], {}, "x"
    for index, kind in enumerate(types):
        number = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        nodes += [cast(source, f"in{index}", number), convolution(f"in{index}", f"out{index}", f"w{index}")]
        weights[f"w{index}"] = np.full((widths[index + 1], widths[index], 1, 1), 0.1, kind)
        source = f"out{index}"
    nodes += [cast(source, "logits"), helper.make_node("Exp", ["logits"], ["y"], name="decode")]
    return model_of(nodes, weights)


def quantized(*, weights_too: bool = True) -> ModelProto:
    """Three convolutions, the middle one between Q/DQ nodes."""
    nodes = [
        convolution("x", "a", "w"),
        helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["aq"], name="q_a"),
        helper.make_node("DequantizeLinear", ["aq", "scale", "zero"], ["ad"], name="dq_a"),
        helper.make_node("DequantizeLinear", ["wq", "scale", "zero"], ["wd"], name="dq_w"),
        convolution("ad", "b", "wd" if weights_too else "w"),
        convolution("b", "c", "w"),
        helper.make_node("Exp", ["c"], ["y"], name="decode"),
    ]
    weight = np.full((32, 32, 1, 1), 0.1, np.float32)
    stored = {"w": weight, "wq": weight.astype(np.int8), "scale": np.float32(0.1), "zero": np.int8(0)}
    return model_of(nodes if weights_too else [node for node in nodes if node.name != "dq_w"], stored)


HALF, FLOAT = np.float16, np.float32


def test_a_float32_graph_is_no_fp16_graph(exported: Exported) -> None:
    layers = compute_layers(onnx.load(exported.path), "fp16")
    with pytest.raises(PrecisionMismatch, match=r"fp16 was asked for, but 0 % .* are HALF.*'node_.*\(FLOAT\)") as error:
        check_precision(layers, "fp16", "model.onnx")
    assert error.value.exit_code == 3
    assert check_precision(compute_layers(onnx.load(exported.path), "fp32"), "fp32", "model.onnx") == 1.0


def test_a_tenth_of_the_multiplications_may_stay_float32_and_no_more() -> None:
    narrow = compute_layers(chain([HALF, HALF, FLOAT], [32, 32, 4]), "fp16")
    assert num_layers_by_type(narrow) == {"HALF": 2, "FLOAT": 1}
    assert check_precision(narrow, "fp16", "a") == pytest.approx(1 - 4 / (32 + 32 + 4))
    wide = compute_layers(chain([HALF, HALF, FLOAT]), "fp16")
    with pytest.raises(PrecisionMismatch, match=r"67 % of the multiplications of b are HALF.*'conv_out2' \(FLOAT\)"):
        check_precision(wide, "fp16", "b")


def test_a_type_that_nobody_asked_for_is_refused_however_little_it_is() -> None:
    layers = compute_layers(chain([FLOAT, FLOAT, HALF], [32, 32, 1]), "fp32")
    with pytest.raises(PrecisionMismatch, match=r"nothing but FLOAT beside it.*'conv_out2' \(HALF\)"):
        check_precision(layers, "fp32", "a")


def test_multiplications_are_those_of_one_image(exported: Exported) -> None:
    first = compute_layers(onnx.load(exported.path), "fp32")[0]
    height, width = exported.signature.canvas_height, exported.signature.canvas_width
    assert first.multiplications == 16 * 3 * 7 * 7 * (height // 2) * (width // 2)


def test_the_first_and_the_last_layers_are_exempt_from_int8_and_from_nothing_else() -> None:
    layers = compute_layers(quantized(), "int8")
    found = [(layer.type, layer.exempt) for layer in layers]
    assert found == [("FLOAT", "first layers"), ("INT8", ""), ("FLOAT", "last layers")]
    assert check_precision(layers, "int8", "a") == 1.0
    assert not any(layer.exempt for layer in compute_layers(quantized(), "fp16"))


def test_quantized_activations_with_float32_weights_are_not_int8() -> None:
    with pytest.raises(PrecisionMismatch, match=r"0 % .* are INT8"):
        check_precision(compute_layers(quantized(weights_too=False), "int8"), "int8", "a")


def test_a_detector_too_narrow_for_fp8_is_refused_although_all_its_layers_are_exempt() -> None:
    layers = compute_layers(chain([FLOAT] * 3, [16, 16, 16]), "fp8")
    assert {layer.exempt for layer in layers} == {"first layers", "16 channels or less", "last layers"}
    with pytest.raises(PrecisionMismatch, match=r"0 % .* are FP8"):
        check_precision(layers, "fp8", "a")


def test_decoding_in_half_is_named() -> None:
    model = chain([HALF, HALF])
    assert check_float32_tail(model, "a") == 2
    nodes = [node for node in model.graph.node if node.name not in ("cast_to_logits", "decode")]
    del model.graph.node[:]
    exp = helper.make_node("Exp", ["out1"], ["boxes"], name="decode")
    model.graph.node.extend([*nodes, exp, cast("boxes", "y")])
    with pytest.raises(PrecisionMismatch, match=r"1 of the 2 nodes of a .* float32: 'decode' \(Exp, HALF\)"):
        check_float32_tail(model, "a")


def test_a_detour_through_half_and_a_quantized_box_are_named_too() -> None:
    model = chain([HALF])
    model.graph.node[-1].input[0] = "back"
    detour = [cast("logits", "low", TensorProto.FLOAT16), cast("low", "back")]
    nodes = [*model.graph.node[:-1], *detour, model.graph.node[-1]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    with pytest.raises(PrecisionMismatch, match=r"'cast_to_low' \(Cast, HALF\)\. "):
        check_float32_tail(model, "a")
    model = quantized()
    nodes = list(model.graph.node)
    nodes[-1].input[0] = "dd"
    nodes[-1:-1] = [
        helper.make_node("QuantizeLinear", ["c", "scale", "zero"], ["dq"], name="q_c"),
        helper.make_node("DequantizeLinear", ["dq", "scale", "zero"], ["dd"], name="dq_c"),
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    with pytest.raises(PrecisionMismatch, match=r"'q_c' \(QuantizeLinear, quantized\), 'dq_c'"):
        check_float32_tail(model, "a")


def test_half_inside_the_loop_of_nms_is_named(exported: Exported) -> None:
    model = onnx.load(exported.path)
    assert check_float32_tail(model, "a") > 100
    (loop,) = [node for node in model.graph.node if node.op_type == "Loop"]
    body = loop.attribute[0].g
    index = next(i for i, node in enumerate(body.node) if node.op_type == "Div")
    overlap = body.node[index].output[0]
    body.node[index].output[0] = "exact"
    rounded = [cast("exact", "rounded", TensorProto.FLOAT16), cast("rounded", overlap)]
    nodes = [*body.node[: index + 1], *rounded, *body.node[index + 1 :]]
    del body.node[:]
    body.node.extend(nodes)
    with pytest.raises(PrecisionMismatch, match=r"'cast_to_rounded' \(Cast, HALF\)"):
        check_float32_tail(model, "a")
