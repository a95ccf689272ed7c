"""Stock detectron2 detector → one tensor-in, tensor-out graph with preprocessing, decoding and NMS inside.

The graph is what detectron2 computes on the same canvas, with static shapes but for the batch: fixed top-k's instead of
thresholds, then exact greedy NMS, then clipping. Decoding and NMS are float32 whatever the rest is. A family is a graph
in a module of its own and a line in :data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import nn

from export.config import NmsChoice
from export.dense_graph import (
    dense_settings,
    distribution_retinanet_graph,
    fcos_graph,
    location_graph,
    retinanet_graph,
)
from export.graph_parts import DetectorGraph, InferenceSettings
from export.signature import DetectorSignature
from export.two_stage_graph import two_stage_graph, two_stage_settings, why_unsupported
from training.detectors.distribution_retinanet import DistributionRetinaNet
from training.detectors.gfl_detector import GflDetector
from training.detectors.location_detector import LocationDetector

MAX_CANDIDATES = 3840  # TensorRT's largest top-k


class UnsupportedDetector(ValueError):
    """The detector, or what is asked of it, has no export graph."""

    exit_code = 2


class Family(NamedTuple):
    """How detectors of a class, and of its subclasses, are exported.

    Attributes:
        graph: called with detector, signature and NMS; what :func:`detector_graph` returns.
        settings: reads the detector's own thresholds and limits.
        refusal: what a detector of the class has that the graph cannot do; None for nothing.
    """

    graph: Callable[[Any, DetectorSignature, NmsChoice], DetectorGraph]
    settings: Callable[[Any], InferenceSettings]
    refusal: Callable[[Any], str | None] = lambda detector: None


FAMILIES: dict[type[nn.Module], Family] = {
    RetinaNet: Family(retinanet_graph, dense_settings),
    FCOS: Family(fcos_graph, dense_settings),
    LocationDetector: Family(location_graph, dense_settings),
    GflDetector: Family(location_graph, dense_settings),
    DistributionRetinaNet: Family(distribution_retinanet_graph, dense_settings),
    GeneralizedRCNN: Family(two_stage_graph, two_stage_settings, why_unsupported),
}


def detector_graph(detector: nn.Module, signature: DetectorSignature, nms: NmsChoice = "portable") -> DetectorGraph:
    """Build the export graph of a stock detector.

    The graph shares the detector's parameters, sets it to eval mode and lives on its device.

    Args:
        detector: a detectron2 detector.
        signature: what the graph must take and give (:func:`signature_of`).
        nms: how overlapping boxes are dropped (:class:`export.config.ExportConfig`).

    Returns:
        A module: uint8 images (N, 3, H, W) → the signature's outputs in their order, or with ``nms="outside"`` the
        :data:`export.candidate_nms.CANDIDATES` that :func:`export.candidate_nms.outputs_from_candidates` makes them of.

    Raises:
        UnsupportedDetector: no rule for this family, or canvas, classes and detector do not fit together.
    """
    family = _family(detector)
    divisor = detector.backbone.size_divisibility
    height, width = signature.canvas_height, signature.canvas_width
    if divisor > 1 and (height % divisor or width % divisor):
        raise UnsupportedDetector(
            f"export: canvas {height} x {width} is not divisible by {divisor}, the backbone's size_divisibility; "
            f"the nearest that is: {-(-height // divisor) * divisor} x {-(-width // divisor) * divisor}"
        )
    square = detector.backbone.padding_constraints.get("square_size", 0)
    if square and (height, width) != (square, square):
        raise UnsupportedDetector(
            f"export: the backbone pads every image to {square} x {square} and the canvas is {height} x {width}; give "
            f"export.canvas=[{square},{square}]"
        )
    settings = family.settings(detector)
    if settings.num_classes != len(signature.class_names):
        raise UnsupportedDetector(
            f"export: the detector has {settings.num_classes} classes but the signature names "
            f"{len(signature.class_names)}; both must come from the same data set"
        )
    if settings.num_candidates > MAX_CANDIDATES:
        raise UnsupportedDetector(
            f"export: the detector takes up to {settings.num_candidates} candidates at once and TensorRT at most "
            f"{MAX_CANDIDATES}; lower the detector's top-k for inference"
        )
    if nms == "outside" and signature.mask_size is not None:
        raise UnsupportedDetector(
            f"export: {type(detector).__name__} draws masks after NMS, which must be in the graph for that; export.nms "
            "is 'outside', and can be 'portable' or 'onnx'"
        )
    return family.graph(detector, signature, nms)


def signature_of(
    detector: nn.Module,
    *,
    canvas: tuple[int, int],
    short_edge: int,
    max_edge: int,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    max_batch_size: int,
) -> DetectorSignature:
    """Read from a stock detector what its exported form promises.

    Args:
        detector: a detectron2 detector; thresholds, means and channel order are its own.
        canvas: (H, W) in pixels, divisible by the backbone's stride.
        short_edge, max_edge: detectron2's ``ResizeShortestEdge`` rule, pixels.
        class_names, category_ids: of each label, in label order.
        max_batch_size: largest N.

    Raises:
        UnsupportedDetector: no rule for this family, images that do not fit the canvas, or a detector that does not say
            its channel order.
    """
    settings = _family(detector).settings(detector)
    if short_edge > min(canvas) or max_edge > max(canvas):
        raise UnsupportedDetector(
            f"export: images resized to short edge {short_edge} and at most {max_edge} do not fit a canvas of "
            f"{canvas[0]} x {canvas[1]} (H x W) pixels; enlarge export.canvas or lower the edges"
        )
    channel_order = getattr(detector, "input_format", None)
    if channel_order is None:
        raise UnsupportedDetector(
            f"export: {type(detector).__name__} does not say whether its images are RGB or BGR; set its input_format"
        )
    return DetectorSignature(
        canvas_height=canvas[0],
        canvas_width=canvas[1],
        short_edge_pixels=short_edge,
        max_edge_pixels=max_edge,
        channel_order=channel_order,
        pad_value=tuple(round(v) for v in detector.pixel_mean.flatten().tolist()),
        max_batch_size=max_batch_size,
        max_detections=settings.max_detections,
        score_threshold=settings.score_threshold,
        nms_threshold=settings.nms_threshold,
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        mask_size=settings.mask_size,
    )


def check_supported(detector: nn.Module) -> None:
    """Refuse a detector that has no export graph, whatever the canvas.

    Raises:
        UnsupportedDetector: names the family or the part, and what is supported.
    """
    _family(detector)


def _family(detector: nn.Module) -> Family:
    supported = f"supported families: {', '.join(sorted(kind.__name__ for kind in FAMILIES))}"
    for kind in type(detector).__mro__:
        if kind in FAMILIES:
            if refusal := FAMILIES[kind].refusal(detector):
                raise UnsupportedDetector(f"export: {type(detector).__name__} has {refusal}; {supported}")
            return FAMILIES[kind]
    raise UnsupportedDetector(
        f"export: there is no export graph for {type(detector).__module__}.{type(detector).__name__}; {supported}. "
        "A family is a line of FAMILIES in export/detector_graph.py."
    )
