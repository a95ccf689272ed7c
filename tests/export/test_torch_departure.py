"""The first place of an export graph in torch that departs, in every family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from export.detector_graph import detector_graph
from export.recorded_modules import Record, first_module
from export.torch_departure import batch_departure, torch_departure
from pipeline.accuracy import detectron2_on_canvas
from tests.dense_detectors import DENSE
from tests.export.conftest import CLASS_NAMES, calibrated_retinanet, canvases, signature_for
from tests.export.tiny_two_stage import calibrated_rcnn

CANVASES = canvases(64, 96, 2)


def detecting(family: str) -> nn.Module:
    """With a threshold that hundreds of candidates pass."""
    if family == "Mask R-CNN":
        return calibrated_rcnn(masks=True)
    if family == "RetinaNet":
        return calibrated_retinanet()
    detector = DENSE[family](len(CLASS_NAMES))
    detector.test_score_thresh = 1e-3
    return detector


def shift(module: nn.Module, name: str) -> None:
    getattr(module, name).add_(2.0)


def take_fewer(graph: nn.Module) -> None:
    graph.proposals.num_candidates = 5


FAULTS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "RetinaNet": (lambda graph: shift(graph.decoder, "anchors_1"), "anchors of level 1"),
    "FCOS": (lambda graph: shift(graph.decoder, "points_0"), "points of level 0"),
    "PaperFCOS": (lambda graph: shift(graph.decoder, "points_0"), "decoder"),
    "GFL": (lambda graph: shift(graph.decoder, "strides_0"), "decoder"),
    "DistributionRetinaNet": (lambda graph: shift(graph.decoder, "points_0"), "points of level 0"),
    "Mask R-CNN": (take_fewer, "proposals"),
}


@pytest.mark.parametrize("family", FAULTS)
def test_a_sound_graph_does_not_depart_and_a_fault_after_the_head_is_named(family: str) -> None:
    detector = detecting(family)
    signature = signature_for(detector, 64, 96)
    graph = detector_graph(detector, signature)
    assert sum(len(detectron2_on_canvas(detector, canvas)) for canvas in CANVASES) > 20
    for canvas in CANVASES:
        assert torch_departure(detector, graph, signature, canvas, detectron2_on_canvas) is None
    assert batch_departure(graph, signature, CANVASES) is None
    fault, place = FAULTS[family]
    fault(graph)
    found = torch_departure(detector, graph, signature, CANVASES[0], detectron2_on_canvas)
    assert found is not None
    assert found.node == place


def test_what_the_graph_does_not_run_and_what_has_another_shape_is_told() -> None:
    reference = {f"output of head, {level}": Record("head", "Head", torch.ones(1, 2, 4, 4)) for level in range(2)}
    found = first_module(reference, dict([*reference.items()][:1]))
    assert found is not None
    assert (found.node, found.makes) == ("head", "output of head, 1")
    assert "a level of the pyramid is left out" in found.reason
    smaller = Record("head", "Head", torch.ones(1, 2, 2, 2))
    found = first_module(reference, {**reference, "output of head, 0": smaller})
    assert found is not None
    assert found.makes == "output of head, 0"
    assert found.reason == "the graph makes (1, 2, 2, 2) and detectron2 (1, 2, 4, 4)"
    assert first_module(reference, reference) is None


def test_looking_leaves_the_detector_as_it_was() -> None:
    detector = detecting("RetinaNet")
    signature = signature_for(detector, 64, 96)
    settings = detector.test_nms_thresh, detector.max_detections_per_image
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    torch_departure(detector, detector_graph(detector, signature), signature, CANVASES[0], detectron2_on_canvas)
    assert (detector.test_nms_thresh, detector.max_detections_per_image) == settings
    assert all(torch.equal(value, state[name]) for name, value in detector.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in detector.modules())
