"""Deformable convolutions in operators that TensorRT has, against ONNX Runtime's DeformConv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.deformable_sampling import UnsupportedDeformConv, as_samples, position_nodes
from export.precision_audit import compute_layers
from export.targets.tensorrt_target import build_engine, load_tensorrt, quiet_logger
from tests.export.conftest import Exported

CHANNELS, HEIGHT, WIDTH = 8, 11, 17
FLOAT = TensorProto.FLOAT


def deformable(
    *, stride: int, dilation: int, groups: int, masked: bool, biased: bool, offset_group: int = 1
) -> ModelProto:
    """One layer with a 3x3 kernel, padded to lose no cell at stride 1."""
    generator = np.random.default_rng(0)
    out = ["batch", (HEIGHT - 1) // stride + 1, (WIDTH - 1) // stride + 1]
    sizes = {"x": (CHANNELS, HEIGHT, WIDTH), "offset": (18 * offset_group, *out[1:]), "mask": (9, *out[1:])}
    inputs = [helper.make_tensor_value_info(name, FLOAT, ["batch", *size]) for name, size in sizes.items()]
    weights = generator.normal(size=(6, CHANNELS // groups, 3, 3)).astype(np.float32) / CHANNELS
    stored = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.ones(6, np.float32), "b")]
    names = ["x", "w", "offset", "b" if biased else "", "mask" if masked else ""]
    node = helper.make_node(
        "DeformConv",
        names if masked else names[: 3 + biased],
        ["y"],
        name="layer",
        strides=[stride, stride],
        dilations=[dilation, dilation],
        pads=[dilation] * 4,
        group=groups,
        offset_group=offset_group,
    )
    output = helper.make_tensor_value_info("y", FLOAT, ["batch", 6, *out[1:]])
    graph = helper.make_graph([node], "g", inputs, [output], stored if biased else stored[:1])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def outputs(model: ModelProto, images: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {each.name: images[each.name] for each in session.get_inputs()})[0]


@pytest.mark.parametrize(
    "layer",
    [
        {"stride": 1, "dilation": 1, "groups": 1, "masked": True, "biased": False},
        {"stride": 2, "dilation": 1, "groups": 2, "masked": True, "biased": True},
        {"stride": 1, "dilation": 2, "groups": 2, "masked": False, "biased": True},
    ],
)
def test_samples_give_what_the_operator_gives_for_batches_of_any_size(layer: dict[str, Any]) -> None:
    model = deformable(**layer)
    sampled = as_samples(model)
    assert "DeformConv" not in {node.op_type for node in sampled.graph.node}
    generator = np.random.default_rng(1)
    for batch in (1, 3):
        images = {
            value.name: generator.normal(
                size=[batch, *[d.dim_value for d in value.type.tensor_type.shape.dim[1:]]], scale=3
            ).astype(np.float32)
            for value in model.graph.input
        }  # offsets of several cells: taps leave the image on every side
        expected = outputs(model, images)
        np.testing.assert_allclose(outputs(sampled, images), expected, rtol=0, atol=2e-5 * expected.std())


def test_the_convolution_keeps_its_name_and_multiplications_and_positions_are_named() -> None:
    model = deformable(stride=1, dilation=1, groups=2, masked=True, biased=True)
    sampled = as_samples(model)
    (before,), (after,) = compute_layers(model, "fp16"), compute_layers(sampled, "fp16")
    assert (before.name, before.op, after.name, after.op) == ("layer", "DeformConv", "layer", "Conv")
    assert before.multiplications == after.multiplications == 6 * HEIGHT * WIDTH * 9 * CHANNELS // 2
    names = {node.name: node.op_type for node in sampled.graph.node}
    assert {names[name] for name in position_nodes(sampled)} >= {"GridSample", "Mul", "Add", "Transpose"}
    assert not {"layer", "layer/masked"} & set(position_nodes(sampled))


def test_the_operator_itself_is_exempt_from_int8_and_a_model_without_it_is_left_alone(exported: Exported) -> None:
    model = onnx.load(exported.path)
    assert as_samples(model) is model
    (layer,) = compute_layers(deformable(stride=1, dilation=1, groups=1, masked=True, biased=False), "int8")
    assert layer.exempt


@pytest.mark.skipif(load_tensorrt().__name__ != "tensorrt_rtx", reason="TensorRT proper may have the plugin")
def test_tensorrt_rtx_parses_the_samples_and_not_the_operator() -> None:
    model = deformable(stride=2, dilation=1, groups=2, masked=True, biased=False)
    trt = load_tensorrt()
    parsed = []
    for each in (model, as_samples(model)):
        logger = quiet_logger(trt)
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        parsed.append(parser.parse(each.SerializeToString()))
    assert parsed == [False, True]


def test_offsets_in_several_groups_are_refused_by_the_nodes_name(exported: Exported, tmp_path: Path) -> None:
    onnx.save(
        deformable(stride=1, dilation=1, groups=1, masked=False, biased=False, offset_group=2), tmp_path / "m.onnx"
    )
    with pytest.raises(UnsupportedDeformConv, match=r"'layer' \(DeformConv\).*one group") as error:
        build_engine(tmp_path / "m.onnx", tmp_path / "m.plan", exported.signature)
    assert error.value.exit_code == 2
    assert not (tmp_path / "m.plan").exists()
