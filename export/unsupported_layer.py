"""Which layer of an export graph the exporter cannot take."""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from export.detector_graph import FAMILIES, UnsupportedDetector
from export.signature import DetectorSignature


@contextlib.contextmanager
def unsupported_layer_named(graph: nn.Module, signature: DetectorSignature) -> Iterator[None]:
    """Within it, what the exporter says about a layer becomes one message that names the layer.

    Raises:
        UnsupportedDetector: an operator has no ONNX form, or a layer's Python code depends on the pixels.
    """
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        causes = list(_causes(error))
        reason = " ".join(str(causes[-1]).split("\n\n")[0].split())
        operator = re.search(r"op='([\w.]+)'", reason)
        if operator:
            layer = _layer_that_calls(operator[1], graph, signature)
            reason = f"ONNX has no operator for {operator[1]}"
        else:
            layer = _innermost((frame for frame, _ in traceback.walk_tb(causes[-1].__traceback__)), graph)
        raise UnsupportedDetector(
            f"export: {layer} cannot be exported: {reason}. Put a layer of plain torch operators in its place; "
            f"supported families: {', '.join(sorted(kind.__name__ for kind in FAMILIES))}"
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _layer_that_calls(operator: str, graph: nn.Module, signature: DetectorSignature) -> str:
    """The layer that calls an operator, such as ``aten._linalg_svd``, on an empty canvas."""
    found: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func).startswith(f"{operator}.") and not found:
                found.append(_innermost(reversed(list(_outwards(sys._getframe()))), graph))
            return func(*args, **(kwargs or {}))

    device = next(graph.buffers()).device
    with torch.no_grad(), Watch():
        graph(torch.zeros(1, *signature.image_shape, dtype=torch.uint8, device=device))
    return found[0] if found else f"the layer that calls {operator}"


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _innermost(frames: Iterable[FrameType], graph: nn.Module) -> str:
    """Name and class of the last module of ``graph`` whose method is among the frames, outermost frame first."""
    names = {id(module): name for name, module in graph.named_modules()}
    layer = "a layer"
    for frame in frames:
        module = frame.f_locals.get("self")
        if id(module) in names:
            layer = f"layer {names[id(module)] or 'the graph itself'} ({type(module).__name__})"
    return layer
