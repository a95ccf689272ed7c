"""The exported graph against detectron2's own inference on the same canvas, and faults that the comparison must see."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import nn

from export.dense_graph import DenseGraph
from export.detector_graph import UnsupportedDetector, detector_graph, signature_of
from export.parity import MatchResult, combined, match_detections
from export.runners import OnnxRuntimeRunner, Runner, TorchRunner
from export.signature import Detections
from tests.export.conftest import (
    CLASS_NAMES,
    Exported,
    calibrated_retinanet,
    canvases,
    detectron2_detections,
    signature_for,
)


def matched(runner: Runner, images: list[np.ndarray], references: list[Detections]) -> MatchResult:
    signature = runner.signature
    found = [runner.run(image[None])[0] for image in images]
    return combined(
        match_detections(
            reference,
            candidate,
            score_threshold=signature.score_threshold,
            max_detections=signature.max_detections,
        )
        for reference, candidate in zip(references, found, strict=True)
    )


def test_onnx_runtime_finds_what_detectron2_finds_on_the_same_canvas(exported: Exported) -> None:
    signature = exported.signature
    images = canvases(signature.canvas_height, signature.canvas_width, 20)
    references = [detectron2_detections(exported.detector, image) for image in images]
    with OnnxRuntimeRunner(exported.path, signature, num_threads=1) as runner:
        result = matched(runner, images, references)
    assert result.num_unmatched == 0, result
    assert result.num_images == 20
    assert result.num_matched > 1000
    assert result.num_tolerated < 10


def test_lists_that_are_not_full_match_too(exported: Exported) -> None:
    detector = copy.deepcopy(exported.detector)
    detector.test_score_thresh, detector.test_nms_thresh, detector.max_detections_per_image = 0.2, 0.3, 300
    signature = signature_for(detector, 256, 256)
    images = canvases(256, 256, 5)
    references = [detectron2_detections(detector, image) for image in images]
    assert any(0 < len(reference) < 300 for reference in references)
    result = matched(TorchRunner(detector_graph(detector, signature), signature), images, references)
    assert result.num_unmatched == 0, result


def test_other_delta_weights_and_fewer_candidates_than_the_levels_hold_match() -> None:
    detector = calibrated_retinanet(seed=3)
    detector.box2box_transform.weights = (10.0, 8.0, 5.0, 4.0)
    detector.test_topk_candidates = 37
    signature = signature_for(detector, 256, 256)
    images = canvases(256, 256, 5)
    references = [detectron2_detections(detector, image) for image in images]
    result = matched(TorchRunner(detector_graph(detector, signature), signature), images, references)
    assert result.num_unmatched == 0, result
    assert result.num_matched > 50


def _mean_doubled(graph: DenseGraph) -> None:
    graph.mean.mul_(2)


def _channels_swapped(graph: DenseGraph) -> None:
    first = graph.backbone.bottom_up.stem.conv1
    first.weight.data = first.weight.data.flip(1)


def _anchors_shifted(graph: DenseGraph) -> None:
    graph.decoder.anchors_0.add_(4)


def _nms_threshold_changed(graph: DenseGraph) -> None:
    graph.signature = dataclasses.replace(graph.signature, nms_threshold=0.6)


def _classes_in_wrong_order(graph: DenseGraph) -> None:
    for parameter in (graph.head.cls_score.weight, graph.head.cls_score.bias):
        by_anchor = parameter.data.view(-1, len(CLASS_NAMES), *parameter.shape[1:])
        parameter.data = by_anchor.flip(1).reshape(parameter.shape)


@pytest.mark.parametrize(
    "fault", [_mean_doubled, _channels_swapped, _anchors_shifted, _nms_threshold_changed, _classes_in_wrong_order]
)
def test_a_broken_graph_does_not_match(fault: Callable[[DenseGraph], None]) -> None:
    detector = calibrated_retinanet()
    signature = signature_for(detector, 256, 256)
    images = canvases(256, 256, 4)
    references = [detectron2_detections(detector, image) for image in images]
    graph = detector_graph(detector, signature)
    runner = TorchRunner(graph, signature)
    assert matched(runner, images, references).num_unmatched == 0
    assert isinstance(graph, DenseGraph)
    fault(graph)
    assert matched(runner, images, references).num_unmatched > 0


def test_the_signature_reads_thresholds_channel_order_and_padding_from_the_detector(tiny_retinanet: RetinaNet) -> None:
    tiny_retinanet.test_score_thresh, tiny_retinanet.input_format = 0.07, "BGR"
    signature = signature_for(tiny_retinanet, 256, 320)
    assert (signature.canvas_height, signature.canvas_width) == (256, 320)
    assert (signature.score_threshold, signature.nms_threshold, signature.max_detections) == (0.07, 0.5, 100)
    assert signature.channel_order == "BGR"
    assert signature.pad_value == (124, 116, 104)


def test_a_detector_without_a_rule_is_refused_with_the_families_that_have_one() -> None:
    families = "DistributionRetinaNet, FCOS, GeneralizedRCNN, GflDetector, LocationDetector, RetinaNet"
    with pytest.raises(
        UnsupportedDetector, match=rf"torch\.nn\.modules\.linear\.Linear; supported families: {families}"
    ):
        signature_of(
            nn.Linear(1, 1),
            canvas=(64, 64),
            short_edge=64,
            max_edge=64,
            class_names=(),
            category_ids=(),
            max_batch_size=1,
        )


def test_a_canvas_that_the_stride_does_not_divide_is_refused_with_the_nearest_that_it_does(
    tiny_retinanet: RetinaNet,
) -> None:
    with pytest.raises(UnsupportedDetector, match=r"250 x 256 is not divisible by 32.*256 x 256"):
        detector_graph(tiny_retinanet, signature_for(tiny_retinanet, 250, 256))


def test_a_backbone_that_pads_to_a_square_takes_no_other_canvas(tiny_retinanet: RetinaNet) -> None:
    tiny_retinanet.backbone._square_pad = 128
    with pytest.raises(UnsupportedDetector, match=r"pads every image to 128 x 128 .*export\.canvas=\[128,128\]"):
        detector_graph(tiny_retinanet, signature_for(tiny_retinanet, 96, 128))
    detector_graph(tiny_retinanet, signature_for(tiny_retinanet, 128, 128))


def test_images_larger_than_the_canvas_and_a_wrong_number_of_classes_are_refused(tiny_retinanet: RetinaNet) -> None:
    common = {"canvas": (64, 96), "short_edge": 64, "class_names": ("a",), "category_ids": (1,), "max_batch_size": 1}
    with pytest.raises(UnsupportedDetector, match="do not fit a canvas of 64 x 96"):
        signature_of(tiny_retinanet, max_edge=100, **common)
    with pytest.raises(UnsupportedDetector, match="5 classes but the signature names 1"):
        detector_graph(tiny_retinanet, signature_of(tiny_retinanet, max_edge=96, **common))


def test_the_graph_is_the_stock_detectors_parameters_and_nothing_else(tiny_retinanet: RetinaNet) -> None:
    graph = detector_graph(tiny_retinanet, signature_for(tiny_retinanet, 64, 64))
    stock = {parameter.data_ptr() for parameter in tiny_retinanet.parameters()}
    assert {parameter.data_ptr() for parameter in graph.parameters()} == stock
    assert not graph.training
    with torch.no_grad():
        outputs = graph(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert [tuple(output.shape) for output in outputs] == [(1, 1), (1, 100, 4), (1, 100), (1, 100)]
    assert [output.dtype for output in outputs] == [torch.int32, torch.float32, torch.float32, torch.int32]
