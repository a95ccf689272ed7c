"""The first place of an export graph in torch that departs from detectron2's own inference on the same canvas.

Both run the same backbone and head, so what goes into these and what each of their modules makes is compared in the
order of execution. What follows is computed in two ways: anchors, candidates (which detectron2 gives when its NMS drops
nothing) or proposals, and detections.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from torch import Tensor, nn

from export.departure import Departure
from export.graph_parts import DetectorGraph
from export.graph_values import distance
from export.parity import match_detections
from export.recorded_modules import (
    TOLERANCE,
    Record,
    departure_at,
    first_module,
    kept_output,
    recorded,
    shared_parts,
)
from export.signature import Detections, DetectorSignature, detections_from_outputs

MAX_UNMATCHED_SHARE = 0.005  # of candidates and proposals: those at a cut-off, or of equal score
_CONSTANTS = ("anchors", "points")
Detect = Callable[[nn.Module, np.ndarray], Detections]
"""detectron2's own inference on a (3, H, W) uint8 canvas."""


def torch_departure(
    detector: nn.Module, graph: DetectorGraph, signature: DetectorSignature, canvas: np.ndarray, detect: Detect
) -> Departure | None:
    """Run both on a canvas and find the first place that departs; None: the detections agree too."""
    reference, detections = recorded(shared_parts(detector), lambda: detect(detector, canvas))
    device = next(graph.buffers()).device
    images = torch.from_numpy(canvas)[None].to(device)
    candidate, outputs = recorded(shared_parts(graph), lambda: graph(images))
    found = first_module(reference, candidate) or _anchors(detector, graph, canvas, detect)
    if found is not None:
        return found
    if isinstance(detector, GeneralizedRCNN):
        found = _proposals(detector, graph, canvas, detect, images)
    else:
        found = _candidates(detector, graph, signature, canvas, detect, images)
    if found is not None:
        return found
    (graphs_own,) = _detections(outputs, signature)
    last = "box and mask heads, NMS" if isinstance(detector, GeneralizedRCNN) else "NMS"
    return _unmatched(
        detections,
        graphs_own,
        signature,
        node=last,
        operator=type(graph).__name__,
        reads="the proposals" if isinstance(detector, GeneralizedRCNN) else "the candidates",
        makes="detections",
        reason="everything before is right: look at the IoU threshold, the number of detections and the clipping to "
        "the canvas (export.nms, export.graph_parts)",
    )


def batch_departure(
    graph: DetectorGraph, signature: DetectorSignature, canvases: Sequence[np.ndarray]
) -> Departure | None:
    """The first place of the graph at which images in a batch get something else than one by one.

    Args:
        canvases: (3, H, W) uint8 each, at least two for a batch.
    """
    images = torch.from_numpy(np.stack(canvases)).to(next(graph.buffers()).device)
    parts = shared_parts(graph)
    alone = [recorded(parts, functools.partial(graph.forward, image[None])) for image in images]
    together, outputs = recorded(parts, lambda: graph(images))
    records = [records for records, _ in alone]
    stacked = {
        key: record._replace(tensor=torch.cat([each[key].tensor for each in records]))
        for key, record in records[0].items()
    }
    found = first_module(stacked, together)
    if found is None:
        batched = _detections(outputs, signature)
        one_by_one = [_detections(made, signature)[0] for _, made in alone]
        places = {"node": "decoding and NMS", "operator": type(graph).__name__, "reads": "the head's outputs"}
        differences = (
            _unmatched(expected, detections, signature, **places, makes="detections", reason="")
            for expected, detections in zip(one_by_one, batched, strict=True)
        )
        found = next((each for each in differences if each is not None), None)
    if found is None:
        return None
    reason = "images in a batch get another result than one by one: look for a size of 1 that is written into the graph"
    return dataclasses.replace(found, batch_size=len(canvases), reason=reason)


def _detections(outputs: Sequence[Tensor], signature: DetectorSignature) -> list[Detections]:
    arrays = [output.cpu().numpy() for output in outputs]
    return detections_from_outputs(dict(zip(signature.output_names, arrays, strict=True)))


def _anchors(detector: nn.Module, graph: DetectorGraph, canvas: np.ndarray, detect: Detect) -> Departure | None:
    """Anchors, or their centres where the graph has only these."""
    two_stage = isinstance(detector, GeneralizedRCNN)
    owner, holder = (detector.proposal_generator, graph.proposals) if two_stage else (detector, graph.decoder)
    generator = getattr(owner, "anchor_generator", None)
    if generator is None:  # of locations; a fault in these shows in the candidates
        return None
    with kept_output(generator) as made:
        detect(detector, canvas)
    for level, boxes in enumerate(made[0]):
        for kind in _CONSTANTS:
            found = getattr(holder, f"{kind}_{level}", None)
            if found is None:
                continue
            expected = boxes.tensor if kind == "anchors" else (boxes.tensor[:, :2] + boxes.tensor[:, 2:]) / 2
            error = distance(found.cpu().numpy(), expected.cpu().numpy())
            if error is None or error > TOLERANCE:
                record = Record(f"{kind} of level {level}", type(generator).__name__, expected)
                offset = (found - expected).mean(dim=0).tolist() if found.shape == expected.shape else "unlike shapes"
                reason = f"the graph's constants are off by {offset} pixels on average; look at offset and strides"
                return departure_at(record, "the sizes of the features", f"{kind}_{level}", found, reason)
    return None


def _candidates(
    detector: nn.Module,
    graph: Any,
    signature: DetectorSignature,
    canvas: np.ndarray,
    detect: Detect,
    images: Tensor,
) -> Departure | None:
    """Decoded boxes, scores and labels before NMS, all levels."""
    everything = {"test_nms_thresh": 2.0, "max_detections_per_image": len(graph.head_in_features) * 10**6}
    usual = {name: getattr(detector, name) for name in everything}
    try:
        vars(detector).update(everything)
        expected = detect(detector, canvas)
    finally:
        vars(detector).update(usual)
    with kept_output(graph.decoder) as levels, torch.inference_mode():
        graph(images)
    boxes, scores, labels = (torch.cat(parts, dim=1)[0].cpu().numpy() for parts in zip(*levels, strict=True))
    size = np.array([signature.canvas_width, signature.canvas_height] * 2, np.float32)
    boxes = np.clip(boxes, 0, size)
    exists = (scores > 0) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return _unmatched(
        expected,
        Detections(boxes=boxes[exists], scores=scores[exists], labels=labels[exists]),
        signature,
        node="decoder",
        operator=type(graph.decoder).__name__,
        reads="the head's outputs",
        makes="candidates",
        reason="the head's outputs are right: look at anchors or points, deltas, top-k and the order of the classes "
        "(export.dense_graph)",
    )


def _proposals(detector: nn.Module, graph: Any, canvas: np.ndarray, detect: Detect, images: Tensor) -> Departure | None:
    with kept_output(detector.proposal_generator) as made:
        detect(detector, canvas)
    with kept_output(graph.proposals) as given, torch.inference_mode():
        graph(images)
    (proposals,), _ = made[0]
    boxes, number, _ = given[0]
    sides = [proposals.proposal_boxes.tensor, boxes[0, : int(number[0, 0])]]
    expected, found = (
        Detections(
            boxes=side.cpu().numpy(),
            scores=np.ones(len(side), np.float32),
            labels=np.zeros(len(side), np.int32),
        )
        for side in sides
    )
    return _unmatched(
        expected,
        found,
        graph.signature,
        node="proposals",
        operator=type(graph.proposals).__name__,
        reads="the RPN head's outputs",
        makes="proposals",
        reason="the RPN head's outputs are right: look at deltas, top-k and NMS of the proposals "
        "(export.two_stage_graph)",
    )


def _unmatched(
    expected: Detections,
    found: Detections,
    signature: DetectorSignature,
    *,
    node: str,
    operator: str,
    reads: str,
    makes: str,
    reason: str,
) -> Departure | None:
    """A departure where any detection, or more than a few candidates or proposals, have no partner."""
    result = match_detections(
        expected,
        found,
        score_threshold=signature.score_threshold,
        max_detections=signature.max_detections if makes == "detections" else 10**9,
        nms_threshold=signature.nms_threshold if makes == "detections" else None,
    )
    few = 0 if makes == "detections" else max(2, MAX_UNMATCHED_SHARE * result.num_matched)
    if result.num_unmatched <= few:
        return None
    return Departure(
        node=node,
        operator=operator,
        reads=(reads,),
        makes=makes,
        reason=f"{result.num_unmatched} of {len(expected)} {makes} of detectron2 and {len(found)} of the graph have no "
        f"partner; {reason}",
    )
