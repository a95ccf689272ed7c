"""Stands in for NVIDIA ModelOpt's AutoCast where that is not installed: every float32 tensor becomes float16."""

from __future__ import annotations

import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper


def convert_to_mixed_precision(
    path: str,
    *,
    low_precision_type: str,
    nodes_to_exclude: list[str],
    data_max: float,
    keep_io_types: bool,
    calibration_data: str,
    providers: list[str],
) -> ModelProto:
    assert (low_precision_type, nodes_to_exclude, keep_io_types, providers) == ("fp16", [], True, ["cpu"])
    model = onnx.load(path)
    graph = model.graph
    kept = {name for node in graph.node if node.op_type == "Resize" for name in node.input[1:]}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in kept:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float16"), tensor.name))
    lowered = {output.name: f"{output.name}_low" for output in graph.output}
    for node in graph.node:
        node.input[:] = [lowered.get(name, name) for name in node.input]
        node.output[:] = [lowered.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    graph.node.extend(helper.make_node("Cast", [low], [name], name=low, to=1) for name, low in lowered.items())
    del graph.value_info[:]
    return model
