"""Whether a graph computes in the precision that was asked for, read from the types that are written into it.

The rule:

* The tail (:mod:`export.trunk`) computes in float32.
* Compute layers are convolutions and matrix products. Exempt are those of the tail; in int8 and fp8 the first and the
  last of the trunk (:func:`export.trunk.outermost`) and the operator ``DeformConv``, which nothing quantizes; in fp8
  convolutions of 16 channels or less, which gain nothing from it. Of the multiplications of all others, nine in ten or
  more are of the type asked for.
* A compute layer is of the type asked for or of float32, and of no other; at least one is of the type asked for.

Types carry TensorRT's names. A layer between Q/DQ nodes is of the type that its factors are quantized to.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from export.trunk import COMPUTE, outermost, subgraphs_of, tail_nodes

MIN_SHARE = 0.9
QUANTIZED = ("int8", "fp8")
NARROW = 16  # channels, in or out, up to which ModelOpt leaves a convolution out of fp8
TYPE_OF = {"fp32": "FLOAT", "tf32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "INT8", "fp8": "FP8"}
"""The type of each precision's layers; TF32 is a way to multiply float32, not a type."""
_NAMES = {TensorProto.FLOAT16: "HALF", TensorProto.BFLOAT16: "BF16", TensorProto.FLOAT8E4M3FN: "FP8"}
_LOWER = {"HALF", "BF16", "FP8", "DOUBLE"}
_QDQ = {"QuantizeLinear", "DequantizeLinear"}


class PrecisionMismatch(RuntimeError):
    """The layers of a graph, a network or an engine are not of the precision asked for."""

    exit_code = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeLayer:
    """A convolution or a matrix product.

    Attributes:
        type: what it multiplies.
        multiplications: for one image; 0 where a shape is unknown.
        exempt: why it need not be of the type asked for; empty: it must.
    """

    name: str
    op: str
    type: str
    multiplications: int
    exempt: str


def compute_layers(model: ModelProto, precision: str) -> list[ComputeLayer]:
    """The compute layers of an ONNX model, those inside loops included, in the graph's order."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    exempt = outermost(model) if precision in QUANTIZED else {}
    layers = []
    for node, in_tail, tensors in _visited(graph):
        if node.op_type not in COMPUTE:
            continue
        other = ""
        if precision in QUANTIZED and node.op_type == "DeformConv":
            other = "no quantized form"
        elif precision == "fp8" and 0 < tensors.num_channels(node) <= NARROW:
            other = f"{NARROW} channels or less"
        why = "float32 tail" if in_tail else exempt.get(node.name, other)
        layers.append(
            ComputeLayer(
                name=node.name,
                op=node.op_type,
                type=tensors.multiplied_type(node),
                multiplications=tensors.multiplications(node),
                exempt=why,
            )
        )
    return layers


def check_precision(layers: Sequence[ComputeLayer], precision: str, where: str) -> float:
    """The share of the multiplications outside the exempt layers that are of the type asked for.

    Raises:
        PrecisionMismatch: it is below :data:`MIN_SHARE`, or a layer is of a type that is neither that nor float32.
    """
    asked = TYPE_OF[precision]
    strangers = [layer for layer in layers if layer.type not in ("FLOAT", asked)]
    judged = [layer for layer in layers if not layer.exempt]
    others = [layer for layer in judged if layer.type != asked]
    total = sum(layer.multiplications for layer in judged)
    share = 1 - sum(layer.multiplications for layer in others) / total if total else float(not others)
    if all(layer.type != asked for layer in layers):
        share, others = 0.0, list(layers)
    if share < MIN_SHARE or strangers:
        wrong = sorted(strangers or others, key=lambda layer: -layer.multiplications)
        names = ", ".join(f"{layer.name!r} ({layer.type})" for layer in wrong[:5])
        raise PrecisionMismatch(
            f"precision: {precision} was asked for, but {100 * share:.0f} % of the multiplications of {where} are "
            f"{asked}, expected {100 * MIN_SHARE:.0f} % or more and nothing but FLOAT beside it. {len(wrong)} of "
            f"{len(layers)} layers are other: {names}. Choose another export.precision; fp32 always works."
        )
    return share


def check_float32_tail(model: ModelProto, where: str) -> int:
    """The number of nodes of the tail, all of which compute in float32.

    The tail begins with the casts that bring the trunk's outputs to float32.

    Raises:
        PrecisionMismatch: names the nodes that do not.
    """
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    nodes = [(node, tensors) for node, in_tail, tensors in _visited(graph) if in_tail]
    offenders = []
    for node, tensors in nodes:
        names = [*node.output] if node.op_type == "Cast" else [*node.input, *node.output]
        found = sorted({tensors.type_of(name) for name in names if name} & _LOWER)
        if found or node.op_type in _QDQ:
            offenders.append(f"{node.name!r} ({node.op_type}, {', '.join(found) or 'quantized'})")
    if offenders:
        raise PrecisionMismatch(
            f"precision: {len(offenders)} of the {len(nodes)} nodes of {where} that decode, choose and suppress boxes "
            f"do not compute in float32: {', '.join(offenders[:5])}. Their boxes would be off by pixels; convert only "
            "the trunk (export.trunk)."
        )
    return len(nodes)


def num_layers_by_type(layers: Sequence[ComputeLayer]) -> dict[str, int]:
    """Number of compute layers of each type, most frequent first."""
    return dict(collections.Counter(layer.type for layer in layers).most_common())


class _Tensors:
    """Types, shapes and producers of what the nodes of a graph read and write; ``outer``: of the graph around it."""

    def __init__(self, graph: GraphProto, outer: _Tensors | None = None) -> None:
        self.types: dict[str, int] = dict(outer.types) if outer else {}
        self.shapes: dict[str, list[int]] = dict(outer.shapes) if outer else {}
        self.producers: dict[str, NodeProto] = dict(outer.producers) if outer else {}
        self.producers.update({name: node for node in graph.node for name in node.output})
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            self.types[value.name] = tensor.elem_type
            self.shapes[value.name] = [dimension.dim_value for dimension in tensor.shape.dim]
        for stored in graph.initializer:
            self.types[stored.name], self.shapes[stored.name] = stored.data_type, list(stored.dims)

    def type_of(self, name: str) -> str:
        number = self.types.get(name, TensorProto.UNDEFINED)
        return _NAMES.get(number, TensorProto.DataType.Name(number))

    def multiplied_type(self, node: NodeProto) -> str:
        """Of both factors before they were dequantized, else of what the node gives."""
        sources = [self.producers.get(name) for name in node.input[:2]]
        if any(source is None or source.op_type != "DequantizeLinear" for source in sources):
            return self.type_of(node.output[0])
        stored = self.type_of(sources[0].input[0])  # type: ignore[union-attr]
        return "INT8" if stored == "UINT8" else stored  # unsigned activations are what CPUs multiply fastest

    def num_channels(self, node: NodeProto) -> int:
        """The smaller number of channels that a convolution reads, of each group, or gives; 0 of another operator."""
        shape = self.shapes.get(node.input[1], [])
        return min(shape[:2]) if node.op_type == "Conv" and shape else 0

    def multiplications(self, node: NodeProto) -> int:
        """For one image; the batch is the first dimension."""
        given, weight = self.shapes.get(node.input[0], []), self.shapes.get(node.input[1], [])
        made = self.shapes.get(node.output[0], [])
        if node.op_type in ("Gemm", "MatMul"):
            return math.prod(made[1:]) * (given[-1] if given else 0)
        positions = given if node.op_type == "ConvTranspose" else made
        return math.prod(positions[1:]) * math.prod(weight[1:]) if positions and weight else 0


def _visited(graph: GraphProto) -> Iterator[tuple[NodeProto, bool, _Tensors]]:
    """Each node, whether it is of the tail, and the tensors it sees; a loop's body follows the loop."""
    made_by_tail = {name for node in tail_nodes(graph) for name in node.output}

    def visit(level: GraphProto, in_tail: bool, outer: _Tensors | None) -> Iterator[tuple[NodeProto, bool, _Tensors]]:
        tensors = _Tensors(level, outer)
        for node in level.node:
            of_tail = in_tail or not made_by_tail.isdisjoint(node.output)
            yield node, of_tail, tensors
            for inner in subgraphs_of(node):
                yield from visit(inner, of_tail, tensors)

    return visit(graph, False, None)
