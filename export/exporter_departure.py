"""Whether ONNX Runtime finds in an exported file what the graph finds in torch: no comparison of files shows that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from export.departure import Departure
from export.graph_parts import DetectorGraph
from export.graph_values import distance, makers_of
from export.head_tensors import graph_head_tensors, onnx_head_tensors
from export.parity import match_detections
from export.runners import OnnxRuntimeRunner, TorchRunner
from export.signature import DetectorSignature

TOLERANCE = 1e-3  # of a head tensor's largest magnitude: two libraries' rounding over a whole network


def exporter_departure(
    path: Path, graph: DetectorGraph, signature: DetectorSignature, canvas: np.ndarray
) -> Departure | None:
    """The first head tensor that departs, or the detections; None: they agree.

    Args:
        path: the exported file, which is as a fresh export makes it.
        graph: the one with NMS inside.
        canvas: (3, H, W) uint8.
    """
    makers = makers_of(onnx.load(path))
    found = onnx_head_tensors(path, optimize=False)(canvas)
    for name, expected in graph_head_tensors(graph)(canvas).items():
        error = distance(found[name], expected)
        if error is None or error > TOLERANCE:
            return Departure(
                node=makers[name].name,
                operator=makers[name].op_type,
                reads=tuple(makers[name].input),
                makes=name,
                max_abs_error=None if error is None else error * float(np.abs(expected).max()),
                max_abs_value=float(np.abs(expected).max()),
                reason="a fresh export gives the same: torch's exporter or ONNX Runtime, in this node or before it",
            )
    (expected_detections,) = TorchRunner(graph, signature).run(canvas[None])
    unmatched = {}
    for optimize in (True, False):
        with OnnxRuntimeRunner(path, signature, optimize=optimize) as runner:
            (detections,) = runner.run(canvas[None])
        unmatched[optimize] = match_detections(
            expected_detections,
            detections,
            score_threshold=signature.score_threshold,
            max_detections=signature.max_detections,
            nms_threshold=signature.nms_threshold,
        ).num_unmatched
    if not unmatched[True]:
        return None
    return Departure(
        node="decoding and NMS" if unmatched[False] else "ONNX Runtime's optimizations",
        operator="-",
        reads=("the head's outputs",),
        makes="detections",
        reason=f"{unmatched[True]} detections have no partner, {unmatched[False]} without ONNX Runtime's "
        "optimizations; a fresh export gives the same: torch's exporter or ONNX Runtime",
    )
