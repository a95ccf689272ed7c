"""The precision of a TensorRT network before it is built, and of an engine where a GPU can load it.

A strongly typed network holds the types of its ONNX file, and the engine those of the network. So the file must keep
the rule of :mod:`export.precision_audit`, every compute layer of the network must have the type that its node of the
same name has in the file, and no layer may have a type that the precision does not know.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from onnx import ModelProto

from export.precision_audit import (
    TYPE_OF,
    PrecisionMismatch,
    check_float32_tail,
    check_precision,
    compute_layers,
)

_FLOAT_TYPES = {"FLOAT", "HALF", "BF16", "INT8", "FP8", "INT4", "FP4"}
_PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")
_WORDS = {"FLOAT": "Float|FP32", "HALF": "Half|FP16", "BF16": "BFloat16|BF16", "INT8": "Int8", "FP8": "FP8|Float8"}
"""The engine inspector's words for a type."""


class LayerTypes(NamedTuple):
    """How many layers are of each type, most frequent first: outputs of all, factors of those that multiply."""

    outputs: dict[str, int]
    products: dict[str, int]


def audit_network(network: Any, precision: str, model: ModelProto, where: str) -> LayerTypes:
    """The types of a network that has the precision asked for.

    Args:
        network: what TensorRT parsed from the model.
        where: the model's file, for messages.

    Raises:
        PrecisionMismatch: names the layers that are not of the precision asked for.
    """
    layers = compute_layers(model, precision)
    written = {layer.name: layer.type for layer in layers}
    found: collections.Counter[str] = collections.Counter()
    offenders = []
    for layer in _layers(network):
        types = [layer.get_output_type(output).name for output in range(layer.num_outputs)]
        found.update(types)
        strange = _FLOAT_TYPES.intersection(types) - {"FLOAT", TYPE_OF[precision]}
        offenders += [f"{layer.name!r} ({name})" for name in sorted(strange)]
    products = list(_products(network))
    offenders += [
        f"{layer.name!r} ({kind}, in the file {written[layer.name]})"
        for layer, kind in products
        if written.get(layer.name, kind) != kind
    ]
    if offenders:
        raise PrecisionMismatch(
            f"engine: {precision} was asked for, but {len(offenders)} of {network.num_layers} layers of {where} "
            f"are not: {', '.join(offenders[:5])}. Strongly typed, the engine would run them as they are; run again "
            "from the export stage (--from export --force)."
        )
    check_precision(layers, precision, where)
    check_float32_tail(model, where)
    multiplied = collections.Counter(kind for _, kind in products)
    return LayerTypes(dict(found.most_common()), dict(multiplied.most_common()))


def num_float_products(network: Any, layer_type: Any) -> int:
    """Number of layers of a kind that multiply in float32."""
    return sum(kind == "FLOAT" and layer.type == layer_type for layer, kind in _products(network))


def inspect_engine(trt: Any, logger: Any, plan: Any, precision: str) -> str:
    """Ask the engine inspector for the types that the engine really uses; needs a GPU that can load the plan.

    Raises:
        PrecisionMismatch: it uses a type that the precision does not know, or nowhere the one asked for.
    """
    import torch

    if not torch.cuda.is_available():
        return "not run: no NVIDIA GPU"
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return f"not run: the engine does not load on this GPU ({torch.cuda.get_device_name()})"
    return confirmed(
        engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON), precision
    )


def confirmed(information: str, precision: str) -> str:
    """What the inspector's JSON says about a precision, in words.

    Raises:
        PrecisionMismatch: see :func:`inspect_engine`.
    """
    asked = TYPE_OF[precision]
    named = {kind for kind, words in _WORDS.items() if re.search(rf"\b({words})\b", information)}
    if not named:
        return "not confirmed: the engine inspector names no types"
    strange = sorted(named - {"FLOAT", asked})
    if strange or asked not in named:
        found = ", ".join(strange) or "no tensor of it"
        raise PrecisionMismatch(f"engine: {precision} was asked for, but the engine inspector finds {found}")
    return f"{precision} confirmed: the engine's tensors are {' and '.join(sorted(named))}"


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def _products(network: Any) -> Iterator[tuple[Any, str]]:
    """Each layer that multiplies matrices, and the type of both factors before they were dequantized."""
    makers = {layer.get_output(i).name: layer for layer in _layers(network) for i in range(layer.num_outputs)}
    for layer in _layers(network):
        if layer.type.name not in _PRODUCTS:
            continue
        factors = [layer.get_input(index) for index in range(min(layer.num_inputs, 2))]
        sources = [_source(factor, makers) for factor in factors if factor is not None]
        if len(sources) == 2 and all(source is not None and source.type.name == "DEQUANTIZE" for source in sources):
            yield layer, sources[0].get_input(0).dtype.name
        else:
            yield layer, layer.get_output_type(0).name


def _source(tensor: Any, makers: Mapping[str, Any]) -> Any:
    """The layer that a tensor comes from; the parser puts shuffles between, to give both factors the same rank."""
    layer = makers.get(tensor.name)
    while layer is not None and layer.type.name == "SHUFFLE":
        layer = makers.get(layer.get_input(0).name)
    return layer
