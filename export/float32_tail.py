"""A converted file's own float32 tail, beside the exported file's on the same values.

A conversion may change the trunk's values (:mod:`export.trunk`) and nothing after them: on what the converted trunk
makes, the exported tail has to find the same detections.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto

from export.providers import usable_providers
from export.runners import detections_from_file
from export.signature import Detections, DetectorSignature
from export.trunk import inputs_of, tail_nodes, trunk_of


def tail_of(model: ModelProto) -> ModelProto:
    """The tail as a model: the graph's inputs and every tensor that it reads of the trunk → the graph's outputs."""
    tail = copy.deepcopy(model)
    trunk, nodes = trunk_of(model).graph, tail_nodes(model.graph)
    for field in ("node", "value_info", "initializer"):
        tail.graph.ClearField(field)
    read = {name for node in nodes for name in inputs_of(node)}
    tail.graph.input.extend(trunk.output)
    tail.graph.node.extend(nodes)
    tail.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    return tail


def own_and_exported_tail(
    converted: Path, exported: Path, signature: DetectorSignature, canvases: Iterable[np.ndarray], optimize: bool = True
) -> tuple[list[Detections], list[Detections]]:
    """What the converted file finds on each canvas, and what the exported tail finds on its trunk's values.

    Args:
        converted: made from ``exported`` by :func:`export.trunk.with_trunk`.
        canvases: (3, H, W) uint8 each.
        optimize: as of :class:`export.runners.OnnxRuntimeRunner`.
    """
    model, tail = onnx.load(converted), tail_of(onnx.load(exported))
    values = [value.name for value in tail.graph.input if value.name != signature.input_name]
    outputs = [output.name for output in tail.graph.output]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    whole, end = (
        onnxruntime.InferenceSession(part.SerializeToString(), options, providers=usable_providers())
        for part in (model, tail)
    )
    taken = {value.name for value in end.get_inputs()}
    own, again = [], []
    for canvas in canvases:
        feeds = {signature.input_name: canvas[None]}
        made = dict(zip([*outputs, *values], whole.run([*outputs, *values], feeds), strict=True))
        feeds |= {name: made[name].astype(np.float32) for name in values}
        ended = end.run(outputs, {name: feeds[name] for name in taken})
        own += detections_from_file({name: made[name] for name in outputs}, signature)
        again += detections_from_file(dict(zip(outputs, ended, strict=True)), signature)
    return own, again
