"""Every value inside an ONNX graph, as ONNX Runtime computes it node by node."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
from onnx import ModelProto, NodeProto

from export.providers import usable_providers
from export.runners import ONNX_RUNTIME_ERRORS

Values = dict[str, np.ndarray]
_NODE_IN_ERROR = re.compile(r"Name:'([^']+)'|[Nn]ode ?(?:name:)? ?\(([^)]+)\)")


class Failure(NamedTuple):
    """What ONNX Runtime does not run.

    Attributes:
        node: its name; None where ONNX Runtime does not say.
        message: ONNX Runtime's own.
    """

    node: str | None
    message: str


def values_of(model: ModelProto, feeds: Mapping[str, np.ndarray]) -> tuple[Values, Failure | None]:
    """What every node of the main graph makes of these inputs, without ONNX Runtime's optimizations.

    Where a node fails, the values are those of the nodes that come before the first that does. All are held at once.
    """
    try:
        return _run(model, feeds), None
    except ONNX_RUNTIME_ERRORS as error:
        named = _NODE_IN_ERROR.search(str(error))
        failure = Failure(named and (named[1] or named[2]), str(error).strip())
    position = next((i for i, node in enumerate(model.graph.node) if node.name == failure.node), None)
    if position is None:
        return {}, failure
    before = copy.deepcopy(model)
    del before.graph.node[position:]
    values, earlier = values_of(before, feeds)
    return values, earlier or failure


def _run(model: ModelProto, feeds: Mapping[str, np.ndarray]) -> Values:
    names = [name for node in model.graph.node for name in node.output if name]
    marked = copy.deepcopy(model)
    del marked.graph.output[:]
    marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # an error is raised and need not be printed too
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(marked.SerializeToString(), options, providers=usable_providers())
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def constants_of(model: ModelProto) -> Values:
    """What is stored in the main graph."""
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def makers_of(model: ModelProto) -> dict[str, NodeProto]:
    """The node that makes each value of the main graph."""
    return {name: node for node in model.graph.node for name in node.output if name}


def distance(value: np.ndarray, reference: np.ndarray) -> float | None:
    """Largest absolute difference, as a share of the reference's largest magnitude.

    None: their shapes differ, or only one of the two is of floating point, or what is not a number is so in one alone.
    """
    if value.shape != reference.shape or (value.dtype.kind == "f") != (reference.dtype.kind == "f"):
        return None
    if value.size == 0:
        return 0.0
    a, b = value.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return None
    error = float(np.abs(a[finite] - b[finite]).max(initial=0))
    largest = float(np.abs(b[finite]).max(initial=0))
    return error / largest if largest else float(error > 0)
