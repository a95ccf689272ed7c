"""Deformable convolutions of an ONNX model as samples at the moved taps and a plain convolution over them.

ONNX Runtime runs the operator ``DeformConv`` (1.31 does, the 1.24 of ModelOpt does not). TensorRT has it as a plugin at
best, TensorRT-RTX not at all, and no quantizer knows it. All of them have ``GridSample`` and ``Conv``, so conversions
and engines start from this form. It computes the same but for rounding: in ONNX Runtime it differed by less than 1e-5,
where outputs had a deviation of 0.3 to 0.4. Three layers of 32 and 128 channels took 6 to 8 times their time there, on
one core, so the exported file keeps the operator.

Shape legend: N images, C channels, H x W input and Ho x Wo output cells, K kernel taps in row order.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.trunk import inputs_of

POSITIONS = "/positions"
"""Begins the last part of the names of the nodes that compute or read positions; in less than float32 they would be off
by a good part of a cell."""


class UnsupportedDeformConv(ValueError):
    """A deformable convolution has no form in plain operators."""

    exit_code = 2


def as_samples(model: ModelProto) -> ModelProto:
    """``model`` with every ``DeformConv`` in plain operators; the convolution has its name. Without any, ``model``.

    Args:
        model: float32, from :func:`export.targets.onnx_target.export_onnx`.

    Raises:
        UnsupportedDeformConv: weights that are not stored, or offsets in several groups.
    """
    if all(node.op_type != "DeformConv" for node in model.graph.node):
        return model
    values = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*values.input, *values.value_info)
    }
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    sampled = copy.deepcopy(model)
    del sampled.graph.node[:]
    for node in model.graph.node:
        if node.op_type != "DeformConv":
            sampled.graph.node.append(node)
            continue
        if node.input[1] not in stored or _attribute(node, "offset_group", [1]) != [1]:
            raise UnsupportedDeformConv(
                f"export: node {node.name!r} (DeformConv) has computed weights or several groups of offsets, and "
                "TensorRT has no such operator; give it stored weights and one group, or serve the float32 ONNX model"
            )
        weights = numpy_helper.to_array(stored[node.input[1]])
        nodes, constants = _sampled(node, weights, shapes[node.input[0]], shapes[node.input[2]])
        sampled.graph.node.extend(nodes)
        sampled.graph.initializer.extend(constants)
    used = {name for node in sampled.graph.node for name in inputs_of(node)}
    kept = [tensor for tensor in sampled.graph.initializer if tensor.name in used]
    del sampled.graph.initializer[:]
    sampled.graph.initializer.extend(kept)
    onnx.checker.check_model(sampled, full_check=True)
    return sampled


def position_nodes(model: ModelProto) -> list[str]:
    """Names of the nodes that compute or read positions."""
    return [node.name for node in model.graph.node if POSITIONS in node.name]


def _sampled(
    node: NodeProto, weights: np.ndarray, given: Sequence[int], moved: Sequence[int]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """One layer: nodes and constants. Shapes of its input (N, C, H, W) and its offsets (N, 2 K, Ho, Wo)."""
    x, _, offsets, *rest = node.input
    bias = [name for name in rest[:1] if name]
    mask = rest[1] if len(rest) > 1 else ""
    (_, channels, *extent), (_, _, height, width) = given, moved
    taps = weights.shape[2] * weights.shape[3]
    constants: list[TensorProto] = []
    nodes: list[NodeProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, f"{node.name}{name}"))
        return constants[-1].name

    def add(op: str, inputs: list[str], name: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [f"{node.name}{name}:0"], name=f"{node.name}{name}", **attributes))
        return nodes[-1].output[0]

    def reshaped(value: str, name: str, *shape: int) -> str:  # 0: as many images as there are
        return add("Reshape", [value, constant(f"{name}_shape", np.array([0, *shape], np.int64))], name)

    size = np.array(extent, np.float64)
    cells = _undeformed(node, weights.shape[2:], height, width)
    grid = reshaped(offsets, f"{POSITIONS}_split", taps, 2, height, width)
    scale = constant("/cells_to_grid", (2 / size)[None, None, :, None, None].astype(np.float32))
    start = ((2 * cells + 1) / size[:, None, None] - 1)[None].astype(np.float32)
    grid = add("Mul", [grid, scale], f"{POSITIONS}_scaled")
    grid = add("Add", [grid, constant("/undeformed", start)], f"{POSITIONS}_moved")
    grid = add("Gather", [grid, constant("/x_then_y", np.array([1, 0], np.int64))], f"{POSITIONS}_swapped", axis=2)
    grid = add("Transpose", [grid], f"{POSITIONS}_last", perm=[0, 1, 3, 4, 2])
    grid = reshaped(grid, f"{POSITIONS}_grid", taps * height, width, 2)
    value = add("GridSample", [x, grid], f"{POSITIONS}_sampled", align_corners=0, mode="linear", padding_mode="zeros")
    if mask:
        value = add("Mul", [value, reshaped(mask, "/mask", 1, taps * height, width)], "/masked")
    value = reshaped(value, "/taps", channels * taps, height, width)
    flat = constant("/weights", weights.reshape(len(weights), -1, 1, 1))
    group = _attribute(node, "group", [1])[0]
    nodes.append(helper.make_node("Conv", [value, flat, *bias], [*node.output], name=node.name, group=group))
    return nodes, constants


def _undeformed(node: NodeProto, kernel: Sequence[int], height: int, width: int) -> np.ndarray:
    """Where the taps of a plain convolution lie, (K, 2, Ho, Wo) cells down and to the right."""
    strides, dilations = (_attribute(node, name, [1, 1]) for name in ("strides", "dilations"))
    pads = _attribute(node, "pads", [0, 0, 0, 0])
    rows, columns = (
        (np.arange(taps) * dilations[axis] - pads[axis])[:, None] + np.arange(cells) * strides[axis]
        for axis, (taps, cells) in enumerate(zip(kernel, (height, width), strict=True))
    )
    shape = (*kernel, height, width)
    down = np.broadcast_to(rows[:, None, :, None], shape)
    right = np.broadcast_to(columns[None, :, None, :], shape)
    return np.stack([down, right], axis=2).reshape(-1, 2, height, width).astype(np.float64)


def _attribute(node: NodeProto, name: str, default: list[int]) -> list[int]:
    for attribute in node.attribute:
        if attribute.name == name:
            value = helper.get_attribute_value(attribute)
            return list(value) if isinstance(value, Sequence) else [value]
    return default
