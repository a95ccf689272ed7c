"""The exported graph of every dense family against the detector's own inference on the same canvas."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch.fcos import FCOS
from torch import nn

from export.dense_graph import DenseGraph
from export.detector_graph import UnsupportedDetector, detector_graph
from export.parity import MatchResult, combined, match_detections
from export.runners import OnnxRuntimeRunner, Runner, TorchRunner
from export.signature import Detections, DetectorSignature
from export.targets.onnx_target import export_onnx
from export.targets.tensorrt_target import build_engine, load_tensorrt
from tests.dense_detectors import DENSE
from tests.export.conftest import CLASS_NAMES, canvases, detectron2_detections, signature_for

CANVAS = (128, 192)
# RetinaNet is exported in tests/export/conftest.py; ATSS is PaperFCOS but for its assignment, and with distributions
# takes them from GFL's graph.
EXPORTED = pytest.mark.parametrize("case", ["FCOS", "PaperFCOS", "GFL", "DistributionRetinaNet"], indirect=True)


def calibrated(family: str, seed: int = 0) -> nn.Module:
    """The tiny detector with weights that give hundreds of boxes of varied score, centerness and shape an image."""
    detector = DENSE[family](len(CLASS_NAMES))
    head = detector.head
    outputs = {name: getattr(head, name) for name in ("cls_score", "bbox_pred", "centerness", "ctrness")
               if hasattr(head, name)}  # fmt: skip
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in outputs}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: seen[name].append(out.flatten()))
        for name, module in outputs.items()
    ]
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in outputs.values():
            nn.init.normal_(module.weight)
        images = torch.from_numpy(np.stack(canvases(*CANVAS, 4, seed=1))).float()
        features = detector.backbone((images - detector.pixel_mean) / detector.pixel_std)
        head([features[name] for name in detector.head_in_features])
        for name, module in outputs.items():
            module.weight.div_(torch.cat(seen[name]).std())
        if family == "RetinaNet":
            head.bbox_pred.weight.mul_(0.3)
        elif family == "GFL" or family.startswith("Distribution"):
            head.bbox_pred.weight.mul_(3)  # or all distributions were flat and all boxes alike
        else:
            head.bbox_pred.bias.fill_(1.5)
        head.cls_score.bias.fill_(-4.0 if family != "FCOS" else -2.5)
        if hasattr(head, "scales"):
            for level, scale in enumerate(head.scales):
                scale.scale.fill_(1 + level / 4)
    for hook in hooks:
        hook.remove()
    return detector


def matched(runner: Runner, images: list[np.ndarray], references: list[Detections]) -> MatchResult:
    signature = runner.signature
    return combined(
        match_detections(
            reference,
            runner.run(image[None])[0],
            score_threshold=signature.score_threshold,
            max_detections=signature.max_detections,
        )
        for image, reference in zip(images, references, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Case:
    family: str
    detector: nn.Module
    signature: DetectorSignature
    images: list[np.ndarray]
    references: list[Detections]


@pytest.fixture(scope="module", params=DENSE)
def case(request: pytest.FixtureRequest) -> Case:
    detector = calibrated(request.param)
    signature = signature_for(detector, *CANVAS)
    images = canvases(*CANVAS, 10)
    references = [detectron2_detections(detector, image) for image in images]
    return Case(request.param, detector, signature, images, references)


@pytest.fixture(scope="module")
def onnx_model(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(case.family) / "model.onnx"
    facts = export_onnx(detector_graph(case.detector, case.signature), case.signature, path)
    assert not set(facts.ops) & {"NonMaxSuppression", "NonZero", "If", "BatchNormalization"}
    return path


def test_the_graph_finds_what_the_detector_finds_on_the_same_canvas(case: Case) -> None:
    graph = detector_graph(case.detector, case.signature)
    result = matched(TorchRunner(graph, case.signature), case.images, case.references)
    assert result.num_unmatched == 0, result
    assert result.num_matched > 500
    assert result.num_tolerated < 10


@EXPORTED
def test_onnx_runtime_finds_what_the_detector_finds_in_batches_too(case: Case, onnx_model: Path) -> None:
    with OnnxRuntimeRunner(onnx_model, case.signature, num_threads=1) as runner:
        result = matched(runner, case.images, case.references)
        batch = runner.run(np.stack(case.images[:5]))
        alone = [runner.run(image[None])[0] for image in case.images[:5]]
    assert result.num_unmatched == 0, result
    assert result.num_matched > 500
    assert [len(x) for x in batch] == [len(x) for x in alone]
    for together, single in zip(batch, alone, strict=True):
        np.testing.assert_allclose(together.scores, single.scores, atol=1e-5)


@EXPORTED
@pytest.mark.skipif(
    not hasattr(load_tensorrt(), "ComputeCapability"), reason="TensorRT proper builds only for the GPU it runs on"
)
def test_tensorrt_takes_every_operator_of_the_graph(case: Case, onnx_model: Path, tmp_path: Path) -> None:
    facts = build_engine(onnx_model, tmp_path / "model.plan", case.signature, compute_capabilities=("75",))
    assert facts.size_bytes > 50_000
    assert not set(facts.layers_by_dtype) & {"HALF", "BF16", "INT8", "FP8"}


def test_short_lists_and_few_candidates_match(case: Case) -> None:
    detector = copy.deepcopy(case.detector)
    detector.test_score_thresh *= 2
    detector.test_topk_candidates, detector.max_detections_per_image = 37, 300
    signature = signature_for(detector, *CANVAS)
    references = [detectron2_detections(detector, image) for image in case.images]
    assert any(0 < len(reference) < 300 for reference in references)
    result = matched(TorchRunner(detector_graph(detector, signature), signature), case.images, references)
    assert result.num_unmatched == 0, result


def test_fcos_with_distances_in_pixels_matches() -> None:
    detector = calibrated("FCOS")
    assert isinstance(detector, FCOS)
    detector.box2box_transform = Box2BoxTransformLinear(normalize_by_size=False)
    detector.head.bbox_pred.weight.data.mul_(16)
    detector.head.bbox_pred.bias.data.mul_(16)
    signature = signature_for(detector, *CANVAS)
    images = canvases(*CANVAS, 3)
    references = [detectron2_detections(detector, image) for image in images]
    result = matched(TorchRunner(detector_graph(detector, signature), signature), images, references)
    assert result.num_unmatched == 0, result
    assert result.num_matched > 30


def test_the_threshold_is_one_of_the_class_score_alone() -> None:
    detector = calibrated("PaperFCOS")
    detector.test_score_thresh = 0.3
    detector.head.centerness.bias.data.fill_(-3.0)
    signature = signature_for(detector, *CANVAS)
    images = canvases(*CANVAS, 3)
    references = [detectron2_detections(detector, image) for image in images]
    assert min(float(reference.scores.min()) for reference in references) < 0.3
    result = matched(TorchRunner(detector_graph(detector, signature), signature), images, references)
    assert result.num_unmatched == 0, result
    assert result.num_matched > 30


def _locations_shifted(graph: DenseGraph) -> None:
    name = "anchors_0" if hasattr(graph.decoder, "anchors_0") else "points_0"
    getattr(graph.decoder, name).add_(4)


def _threshold_raised(graph: DenseGraph) -> None:
    graph.decoder.score_threshold *= 3


def _classes_in_wrong_order(graph: DenseGraph) -> None:
    for parameter in (graph.head.cls_score.weight, graph.head.cls_score.bias):
        by_anchor = parameter.data.view(-1, len(CLASS_NAMES), *parameter.shape[1:])
        parameter.data = by_anchor.flip(1).reshape(parameter.shape)


def _last_output_off(graph: DenseGraph) -> None:
    bias = list(graph.head.children())[-1 if not hasattr(graph.head, "scales") else -2].bias.data
    bias.add_(torch.linspace(0.5, 1.5, len(bias)))  # the same for all the logits of a distribution would change nothing


@pytest.mark.parametrize("fault", [_locations_shifted, _threshold_raised, _classes_in_wrong_order, _last_output_off])
def test_a_broken_graph_does_not_match(case: Case, fault: Callable[[DenseGraph], None]) -> None:
    graph = detector_graph(copy.deepcopy(case.detector), case.signature)
    assert isinstance(graph, DenseGraph)
    fault(graph)
    assert matched(TorchRunner(graph, case.signature), case.images, case.references).num_unmatched > 0


def test_a_head_in_half_precision_still_decodes_in_float32(case: Case) -> None:
    graph = detector_graph(case.detector, case.signature)
    assert isinstance(graph, DenseGraph)
    with torch.no_grad():
        features = graph.backbone(torch.rand(1, 3, *CANVAS))
        outputs = graph.head([features[name] for name in graph.head_in_features])
        boxes, scores, labels = graph.decoder(0, *(level[0].half() for level in outputs))
    assert (boxes.dtype, scores.dtype, labels.dtype) == (torch.float32, torch.float32, torch.int32)


def test_more_candidates_than_tensorrt_takes_are_refused(case: Case) -> None:
    detector = copy.deepcopy(case.detector)
    detector.test_topk_candidates = 4000
    with pytest.raises(UnsupportedDetector, match=r"up to 4000 candidates at once and TensorRT at most 3840"):
        detector_graph(detector, case.signature)


def test_a_detector_that_does_not_say_its_channel_order_is_refused() -> None:
    detector = calibrated("FCOS")
    del detector.input_format
    with pytest.raises(UnsupportedDetector, match="FCOS does not say whether its images are RGB or BGR"):
        signature_for(detector, *CANVAS)
