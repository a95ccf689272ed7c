"""The exported Faster and Mask R-CNN against detectron2's own inference on the same canvas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from torch import nn

from export import roi_pooling
from export.detector_graph import UnsupportedDetector, detector_graph
from export.parity import MatchResult, batch_invariance, combined, match_detections
from export.runners import OnnxRuntimeRunner, Runner, TorchRunner
from export.signature import Detections, DetectorSignature
from export.targets.onnx_target import export_onnx
from export.targets.tensorrt_target import UnsupportedEngine, build_engine, load_tensorrt
from export.two_stage_graph import TwoStageGraph, positive_from_logits
from tests.export.conftest import canvases, signature_for
from tests.export.tiny_two_stage import calibrated_rcnn, detectron2_detections


def images_of(signature: DetectorSignature, num_images: int = 9) -> list[np.ndarray]:
    """Photos, and noise; no flat image, on which all locations tie and none is the right one to take first."""
    return canvases(signature.canvas_height, signature.canvas_width, num_images)


def matched(runner: Runner, images: list[np.ndarray], detector: nn.Module) -> MatchResult:
    signature = runner.signature
    return combined(
        match_detections(
            detectron2_detections(detector, image),
            runner.run(image[None])[0],
            score_threshold=signature.score_threshold,
            max_detections=signature.max_detections,
        )
        for image in images
    )


@dataclasses.dataclass(frozen=True)
class ExportedRcnn:
    detector: nn.Module
    signature: DetectorSignature
    graph: nn.Module
    path: Path


@pytest.fixture(scope="module")
def exported_rcnn(tmp_path_factory: pytest.TempPathFactory) -> ExportedRcnn:
    """A Mask R-CNN; a Faster R-CNN's graph is this one without its last part."""
    detector = calibrated_rcnn(masks=True)
    signature = signature_for(detector, 128, 192)
    graph = detector_graph(detector, signature)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(roi_pooling, "CHUNK_ELEMENTS", 2**18)  # as many chunks as a wide detector has
        export_onnx(graph, signature, path)
    return ExportedRcnn(detector, signature, graph, path)


@pytest.fixture
def onnx_runner(exported_rcnn: ExportedRcnn) -> Iterator[OnnxRuntimeRunner]:
    with OnnxRuntimeRunner(exported_rcnn.path, exported_rcnn.signature, num_threads=1) as runner:
        yield runner


def test_onnx_runtime_finds_and_draws_what_detectron2_does_on_the_same_canvas(
    exported_rcnn: ExportedRcnn, onnx_runner: OnnxRuntimeRunner
) -> None:
    images = images_of(exported_rcnn.signature)
    result = matched(onnx_runner, images, exported_rcnn.detector)
    assert result.num_unmatched == 0, result
    assert result.num_matched > 500
    assert result.num_tolerated < 10
    assert result.max_mask_error < 1e-5
    (found,) = onnx_runner.run(images[0][None])
    assert found.masks is not None
    assert found.masks.shape == (len(found), 28, 28)
    assert found.masks.std(axis=(1, 2)).min() > 0.05, "flat masks would agree whatever is done with them"


def test_onnx_runtime_and_torch_agree_on_a_batch(exported_rcnn: ExportedRcnn, onnx_runner: OnnxRuntimeRunner) -> None:
    images = np.stack(images_of(exported_rcnn.signature, 5))
    in_torch = TorchRunner(exported_rcnn.graph, exported_rcnn.signature).run(images)
    pairs = zip(in_torch, onnx_runner.run(images), strict=True)
    result = combined(match_detections(a, b, score_threshold=0.05, max_detections=100) for a, b in pairs)
    assert result.num_unmatched == 0, result
    assert result.num_matched > 300


def test_an_image_has_the_same_detections_in_every_batch(onnx_runner: OnnxRuntimeRunner) -> None:
    result = batch_invariance(onnx_runner, images_of(onnx_runner.signature, 9), score_floor=0.05)
    assert (result.num_unmatched, result.failed) == (0, ())


@pytest.mark.skipif(
    not hasattr(load_tensorrt(), "ComputeCapability"), reason="TensorRT proper builds only for the GPU it runs on"
)
def test_an_engine_builds_without_a_gpu_but_for_turing_which_has_no_float32_product(
    exported_rcnn: ExportedRcnn, tmp_path: Path
) -> None:
    plan, signature = tmp_path / "model.plan", exported_rcnn.signature
    facts = build_engine(exported_rcnn.path, plan, signature, compute_capabilities=("75", "89"))
    assert facts.compute_capabilities == ("89",)
    assert list(facts.excluded) == ["75"]
    assert facts.size_bytes > 100_000
    with pytest.raises(UnsupportedEngine, match="no float32 matrix product for compute capability 75"):
        build_engine(exported_rcnn.path, plan, signature, compute_capabilities=("75",))


def test_without_masks_the_graph_ends_before_them() -> None:
    detector = calibrated_rcnn(masks=False)
    signature = signature_for(detector, 128, 192)
    runner, images = TorchRunner(detector_graph(detector, signature), signature), images_of(signature)
    result = matched(runner, images, detector)
    assert result.num_unmatched == 0, result
    assert result.num_matched > 500
    assert runner.run(images[0][None])[0].masks is None


def test_one_box_and_one_mask_for_all_classes_match_too() -> None:
    detector = calibrated_rcnn(masks=True, class_agnostic=True)
    signature = signature_for(detector, 128, 192)
    result = matched(TorchRunner(detector_graph(detector, signature), signature), images_of(signature), detector)
    assert result.num_unmatched == 0, result
    assert result.num_matched > 500


def _few_proposals(detector: nn.Module) -> None:
    detector.proposal_generator.min_box_size = 60


def _few_detections(detector: nn.Module) -> None:
    detector.roi_heads.box_predictor.test_score_thresh = 0.8


def _other_limits(detector: nn.Module) -> None:
    rpn, predictor = detector.proposal_generator, detector.roi_heads.box_predictor
    rpn.nms_thresh, rpn.pre_nms_topk, rpn.post_nms_topk = 0.5, {False: 63, True: 100}, {False: 77, True: 100}
    predictor.test_nms_thresh, predictor.test_topk_per_image = 0.3, 17
    predictor.box2box_transform.weights = (9.0, 8.0, 7.0, 6.0)


@pytest.mark.parametrize("change", [_few_proposals, _few_detections, _other_limits])
def test_settings_of_the_detector_are_the_graphs(change: Callable[[nn.Module], None]) -> None:
    detector = calibrated_rcnn(masks=True)
    change(detector)
    signature = signature_for(detector, 128, 192)
    images = images_of(signature)
    result = matched(TorchRunner(detector_graph(detector, signature), signature), images, detector)
    assert result.num_unmatched == 0, result
    numbers = [len(detectron2_detections(detector, image)) for image in images]
    assert 0 < sum(numbers) < 100 * len(images)


def test_nothing_found_is_no_detection_and_empty_slots() -> None:
    detector = calibrated_rcnn(masks=True)
    detector.roi_heads.box_predictor.test_score_thresh = 1.0
    signature = signature_for(detector, 64, 64)
    with torch.no_grad():
        outputs = detector_graph(detector, signature)(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert [tuple(output.shape) for output in outputs] == [(2, *shape) for _, shape in signature.outputs.values()]
    assert [str(output.dtype) for output in outputs] == [f"torch.{dtype}" for dtype, _ in signature.outputs.values()]
    assert not any(output.any() for output in outputs)


def _anchors_shifted(graph: TwoStageGraph) -> None:
    graph.proposals.anchors_1.add_(4)


def _proposals_of_all_levels_suppress_each_other(graph: TwoStageGraph) -> None:
    graph.proposals._candidates = _without_levels(graph.proposals._candidates)  # type: ignore[method-assign]


def _without_levels(candidates: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., tuple[torch.Tensor, ...]]:
    def unlabelled(*arguments: object) -> tuple[torch.Tensor, ...]:
        boxes, scores, labels = candidates(*arguments)
        return boxes, scores, torch.zeros_like(labels)

    return unlabelled


def _boxes_pooled_one_level_too_low(graph: TwoStageGraph) -> None:
    graph.box_pooling.smallest_edges = tuple(2 * edge for edge in graph.box_pooling.smallest_edges)


def _masks_of_the_next_class(graph: TwoStageGraph) -> None:
    graph.mask_head.predictor.weight.data = graph.mask_head.predictor.weight.data.roll(1, 0)


@pytest.mark.parametrize(
    "fault",
    [
        _anchors_shifted,
        _proposals_of_all_levels_suppress_each_other,
        _boxes_pooled_one_level_too_low,
        _masks_of_the_next_class,
    ],
)
def test_a_broken_graph_does_not_match(fault: Callable[[TwoStageGraph], None]) -> None:
    detector = calibrated_rcnn(masks=True)
    detector.proposal_generator.nms_thresh = 0.2
    signature = signature_for(detector, 128, 192)
    images = images_of(signature, 2)
    references = [detectron2_detections(detector, image) for image in images]
    graph = detector_graph(detector, signature)
    assert isinstance(graph, TwoStageGraph)
    fault(graph)
    found = TorchRunner(graph, signature).run(np.stack(images))
    pairs = zip(references, found, strict=True)
    assert sum(match_detections(a, b, score_threshold=0.05, max_detections=100).num_unmatched for a, b in pairs) > 0


def test_logits_keep_their_order_as_positive_numbers() -> None:
    logits = torch.linspace(-40, 40, 10_001)
    positive = positive_from_logits(logits)
    assert (positive > 0).all()
    assert (positive.diff() > 0).all(), "a sigmoid would make those above 17 equal"
    assert positive_from_logits(torch.tensor([-3e38]))[0] > 0


def _rotated_pooling(detector: nn.Module) -> None:
    detector.roi_heads.box_pooler = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 2, "ROIAlignV2")


def _sigmoid_scores(detector: nn.Module) -> None:
    detector.roi_heads.box_predictor.use_sigmoid_ce = True


def _other_heads(detector: nn.Module) -> None:
    detector.roi_heads = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rotated_pooling, "GeneralizedRCNN has a pooler other than a square ROIAlignV2"),
        (_sigmoid_scores, "class scores by sigmoid"),
        (_other_heads, "RPN with Identity"),
    ],
)
def test_what_the_graph_cannot_do_is_refused(change: Callable[[nn.Module], None], message: str) -> None:
    detector = calibrated_rcnn(masks=False)
    change(detector)
    with pytest.raises(UnsupportedDetector, match=message):
        signature_for(detector, 64, 64)


def test_detections_without_masks_are_not_compared_with_detections_with() -> None:
    one = Detections(
        boxes=np.zeros((1, 4), np.float32), scores=np.ones(1, np.float32), labels=np.zeros(1, np.int32),
        masks=np.zeros((1, 28, 28), np.float32),
    )  # fmt: skip
    with pytest.raises(ValueError, match="with masks"):
        match_detections(one, dataclasses.replace(one, masks=None), score_threshold=0.05, max_detections=100)


def test_masks_that_differ_make_a_pair_of_none() -> None:
    one = Detections(
        boxes=np.array([[0, 0, 9, 9]], np.float32), scores=np.ones(1, np.float32), labels=np.zeros(1, np.int32),
        masks=np.full((1, 28, 28), 0.5, np.float32),
    )  # fmt: skip
    near, far = (dataclasses.replace(one, masks=np.full((1, 28, 28), 0.5 + d, np.float32)) for d in (5e-4, 2e-3))
    good = match_detections(one, near, score_threshold=0.05, max_detections=100)
    assert (good.num_matched, good.num_unmatched) == (1, 0)
    assert good.max_mask_error == pytest.approx(5e-4, rel=1e-3)
    bad = match_detections(one, far, score_threshold=0.05, max_detections=100)
    assert (bad.num_matched, bad.num_unmatched) == (0, 2)
