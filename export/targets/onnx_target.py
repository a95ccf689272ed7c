"""Export graph → one self-contained ONNX file."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from export.candidate_nms import CANDIDATES, candidate_outputs
from export.graph_parts import DetectorGraph, Outputs
from export.onnx_nms import TRANSLATIONS
from export.signature import DetectorSignature

OPSET = 20
SIGNATURE_KEY = "detector_signature"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxFacts:
    """What an exported file contains.

    Attributes:
        opset: of the default ONNX domain.
        num_nodes: nodes, those inside loop bodies included.
        num_initializers: stored tensors of the main graph.
        size_bytes: of the file, weights included.
        ops: number of nodes of each operator, most frequent first.
    """

    opset: int
    num_nodes: int
    num_initializers: int
    size_bytes: int
    ops: dict[str, int]


def export_onnx(
    graph: DetectorGraph, signature: DetectorSignature, path: Path, *, ends_at_candidates: bool = False
) -> OnnxFacts:
    """Write the graph as ONNX, weights inside, with a symbolic batch dimension and no other.

    The file is checked (ONNX's own checker with shape inference, names and shapes against the signature), carries the
    signature's JSON as metadata under ``SIGNATURE_KEY``, and holds nothing of the machine that wrote it. The head's
    tensors are values of known names in it, not outputs (:mod:`export.head_tensors`). It appears under its name only
    when it is whole.

    Args:
        graph: from :func:`export.detector_graph.detector_graph`.
        signature: the one the graph was built with.
        path: the file to write; an existing one is replaced.
        ends_at_candidates: the graph was built with ``nms="outside"``.
    """
    model = traced_onnx(graph, signature, ends_at_candidates=ends_at_candidates)
    for node in _nodes(model.graph):
        node.ClearField("metadata_props")  # stack traces with this machine's paths
        node.ClearField("doc_string")
    model.graph.ClearField("metadata_props")
    onnx.helper.set_model_props(model, {SIGNATURE_KEY: signature.to_json()})
    onnx.checker.check_model(model, full_check=True)
    _check_promise(model, signature, ends_at_candidates)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.SerializeToString())
    os.replace(partial, path)
    nodes = list(_nodes(model.graph))
    return OnnxFacts(
        opset=next(o.version for o in model.opset_import if o.domain == ""),
        num_nodes=len(nodes),
        num_initializers=len(model.graph.initializer),
        size_bytes=path.stat().st_size,
        ops=dict(collections.Counter(node.op_type for node in nodes).most_common()),
    )


class _WithHeadTensors(nn.Module):
    """The graph with its head tensors as further outputs: the exporter names a value only where it is an output."""

    def __init__(self, graph: DetectorGraph) -> None:
        super().__init__()
        self.detector = graph  # torch.fx keeps its own under "graph"

    def forward(self, images: Tensor) -> Outputs:
        outputs, head_tensors = self.detector.with_head_tensors(images)
        return (*outputs, *head_tensors.values())


def traced_onnx(
    graph: DetectorGraph, signature: DetectorSignature, *, ends_at_candidates: bool = False
) -> onnx.ModelProto:
    """What :func:`export_onnx` writes, and on each node torch's notes of the module and the line it comes from."""
    output_names = CANDIDATES if ends_at_candidates else signature.output_names
    # Batch 2, because tracing bakes in a dimension of size 1. No gradients, because detectron2's frozen batch norm
    # takes a form that is not folded into the convolution when they are on.
    batch = torch.export.Dim("batch", min=1, max=max(signature.max_batch_size, 2))
    device = next(graph.buffers()).device
    images = torch.zeros(2, *signature.image_shape, dtype=torch.uint8, device=device)
    with quiet(), torch.no_grad():
        head_tensors = graph.eval().with_head_tensors(images)[1]
        program = torch.onnx.export(
            _WithHeadTensors(graph).eval(),
            (images,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[signature.input_name],
            output_names=[*output_names, *head_tensors],
            dynamic_shapes=({0: batch},),
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
        assert program is not None  # with dynamo=True it always returns the program
        model = program.model_proto
    del model.graph.output[len(output_names) :]
    names: set[str] = set()
    for index, node in enumerate(_nodes(model.graph)):
        if node.name in names:  # loop bodies number their nodes from the start; TensorRT warns of each
            node.name = f"{node.name}_{index}"
        names.add(node.name)
    return model


def _check_promise(model: onnx.ModelProto, signature: DetectorSignature, ends_at_candidates: bool) -> None:
    types = {"float32": onnx.TensorProto.FLOAT, "int32": onnx.TensorProto.INT32}
    outputs = signature.outputs
    if ends_at_candidates:  # as many as the detector's pyramid and top-k give
        outputs = candidate_outputs(model.graph.output[1].type.tensor_type.shape.dim[1].dim_value)
    expected = [
        (signature.input_name, onnx.TensorProto.UINT8, signature.image_shape),
        *((name, types[dtype], shape) for name, (dtype, shape) in outputs.items()),
    ]
    found = []
    for value in [*model.graph.input, *model.graph.output]:
        batch, *rest = value.type.tensor_type.shape.dim
        if not batch.dim_param:
            raise RuntimeError(f"onnx: the batch dimension of {value.name!r} is fixed at {batch.dim_value}")
        found.append((value.name, value.type.tensor_type.elem_type, tuple(d.dim_param or d.dim_value for d in rest)))
    if found != expected:
        raise RuntimeError(f"onnx: the graph's inputs and outputs are {found}, but the signature promises {expected}")


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence a library's progress, warnings and log lines; exceptions pass."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(disabled)
