"""Deliberate faults in an export graph in torch and in an exported file, and the node that each is put into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx.numpy_helper
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from export.dense_graph import DenseGraph
from export.graph_values import constants_of
from export.trunk import inputs_of

HALF_A_CELL = 0.5
ARITHMETIC = {"Add", "Clip", "Concat", "Div", "Exp", "Mul", "Slice", "Sub"}


def swap_channels(graph: DenseGraph) -> None:
    graph.with_head_tensors = lambda images: DenseGraph.with_head_tensors(graph, images.flip(1))


def double_mean(graph: DenseGraph) -> None:
    graph.mean.mul_(2)


def shift_anchors(graph: DenseGraph) -> None:
    for level in range(len(graph.head_in_features)):
        getattr(graph.decoder, f"anchors_{level}").add_(HALF_A_CELL * 8 * 2**level)


def drop_level(graph: DenseGraph) -> None:
    """The third level of the pyramid is left out; the head gets the fourth in its place."""
    names = graph.head_in_features
    graph.head_in_features = (*names[:2], names[3], *names[3:])


def decode_in_half(graph: DenseGraph) -> None:
    decode = graph.decoder.forward

    def rounded(level: int, logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, labels = decode(level, logits, deltas.half().float())
        return boxes.half().float(), scores, labels

    graph.decoder.forward = rounded


def bake_batch_in_torch(graph: DenseGraph) -> None:
    """Of a batch, every image gets the first one's detections."""
    graph.with_head_tensors = lambda images: DenseGraph.with_head_tensors(graph, images[:1].expand_as(images))


def change_nms_threshold(graph: DenseGraph) -> None:
    graph.signature = dataclasses.replace(graph.signature, nms_threshold=graph.signature.nms_threshold - 0.2)


def reverse_classes(graph: DenseGraph) -> None:
    decode, num_classes = graph.decoder.forward, graph.decoder.num_classes

    def reversed_labels(level: int, *predicted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, labels = decode(level, *predicted)
        return boxes, scores, num_classes - 1 - labels

    graph.decoder.forward = reversed_labels


def maker(model: ModelProto, value: str) -> NodeProto:
    return next(node for node in model.graph.node if value in node.output)


def reader(model: ModelProto, value: str, operator: str) -> NodeProto:
    """The first node of this operator that reads a value."""
    return next(node for node in model.graph.node if value in node.input and node.op_type == operator)


def set_constant(model: ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(change(values), values.dtype), name))


def swap_channels_of_file(model: ModelProto) -> str:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 1, 0]), "order"))
    cast = reader(model, "images", "Cast")
    cast.input[0] = "swapped"
    model.graph.node.insert(0, helper.make_node("Gather", ["images", "order"], ["swapped"], name="swap", axis=1))
    return "swap"


def double_mean_of_file(model: ModelProto) -> str:
    set_constant(model, "detector.mean", lambda mean: 2 * mean)
    return reader(model, "detector.mean", "Sub").name


def shift_anchors_of_file(model: ModelProto) -> str:
    """Those of the finest level."""
    node = next(node for node in model.graph.node if node.op_type == "GatherND")
    set_constant(model, node.input[0], lambda anchors: anchors + HALF_A_CELL * 8)
    return node.name


def drop_level_of_file(model: ModelProto) -> str:
    """The finest level no longer gets what comes down from the coarser ones."""
    (convolution,) = (n for n in model.graph.node if "detector.backbone.fpn_output3.weight" in n.input)
    add = maker(model, convolution.input[0])
    (lateral,) = (name for name in add.input if maker(model, name).op_type == "Conv")
    add.op_type, add.input[:] = "Identity", [lateral]
    return add.name


def decode_file_in_half(model: ModelProto) -> str:
    """The arithmetic that makes the boxes of every level computes in float16."""
    chosen: dict[str, NodeProto] = {}
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    made = {name: node for node in model.graph.node for name in node.output}
    five = ["Concat"] * 5
    boxes = next(  # of all levels: what the loop reads from outside
        name for name in inputs_of(loop) if name in made and [made[n].op_type for n in made[name].input] == five
    )
    waiting = list(made[boxes].input)
    while waiting:
        node = made.get(waiting.pop())
        if node is not None and node.op_type in ARITHMETIC and node.output[0] not in chosen:
            chosen[node.output[0]] = node
            waiting += node.input
    return _in_half(model, [node for node in model.graph.node if node.output[0] in chosen])


def _in_half(model: ModelProto, nodes: Sequence[NodeProto]) -> str:
    """Cast what these nodes read and what others read of them; the name of the first cast that is made."""
    inside = {name for node in nodes for name in node.output}
    constants = constants_of(model)
    indices = {name for name, value in constants.items() if value.dtype != np.float32}
    lowered: dict[str, str] = {}
    inserted: list[NodeProto] = []
    for node in nodes:
        for position, name in enumerate(node.input):
            if not name or name in indices:
                continue
            if name not in inside and name not in lowered:
                lowered[name] = f"{name} low"
                cast = helper.make_node("Cast", [name], [lowered[name]], name=f"to half {len(inserted)}", to=10)
                before = next(i for i, other in enumerate(model.graph.node) if other.name == node.name)
                model.graph.node.insert(before, cast)
                inserted.append(cast)
            node.input[position] = lowered.get(name, name)
    for node in nodes:
        for other in [other for other in model.graph.node if node.output[0] in other.input]:
            if other.name not in {each.name for each in nodes}:
                back = f"{node.output[0]} back"
                other.input[:] = [back if name == node.output[0] else name for name in other.input]
                cast = helper.make_node("Cast", [node.output[0]], [back], name=back, to=TensorProto.FLOAT)
                after = next(i for i, each in enumerate(model.graph.node) if each.name == node.name)
                model.graph.node.insert(after + 1, cast)
    del model.graph.value_info[:]
    return inserted[0].name


def bake_batch(model: ModelProto) -> str:
    """The first level's logits are flattened as those of one image."""
    node = reader(model, "head/class_logits/0", "Reshape")
    shape = constants_of(model)[node.input[1]]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, -1], shape.dtype), "baked"))
    node.input[1] = "baked"
    return node.name


def change_nms_threshold_of_file(model: ModelProto, threshold: float, changed: float) -> str:
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    constants = constants_of(model)
    (name,) = (
        name for name in set(inputs_of(loop)) if name in constants and np.allclose(constants[name], threshold, 1e-6)
    )
    set_constant(model, name, lambda value: np.full_like(value, changed))
    return loop.name


def reverse_classes_of_file(model: ModelProto, num_classes: int) -> str:
    def reverse(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, num_classes, *values.shape[1:])[:, ::-1].reshape(values.shape)

    for name in ("weight", "bias"):
        set_constant(model, f"detector.head.cls_score.{name}", reverse)
    return maker(model, "head/class_logits/0").name
