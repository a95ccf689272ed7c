"""Detectors with each choice of NMS: one promise, the same detections, and who can run them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.candidate_nms import outputs_from_candidates
from export.config import NmsChoice
from export.detector_graph import UnsupportedDetector, detector_graph
from export.parity import batch_invariance, combined, match_detections
from export.runners import OnnxRuntimeRunner
from export.signature import Detections, DetectorSignature, detections_from_outputs
from export.targets.onnx_target import export_onnx
from export.targets.tensorrt_target import EngineUnavailable, build_engine, load_tensorrt
from tests.export.conftest import Exported, canvases, detectron2_detections, signature_for
from tests.export.tiny_two_stage import calibrated_rcnn
from tests.export.tiny_two_stage import detectron2_detections as detectron2_rcnn_detections

CHOICES: tuple[NmsChoice, ...] = ("onnx", "outside")


def exported_with(choice: NmsChoice, detector: nn.Module, signature: DetectorSignature, path: Path) -> dict[str, int]:
    """Write the ONNX file; the number of nodes of each operator."""
    graph = detector_graph(detector, signature, choice)
    return export_onnx(graph, signature, path, ends_at_candidates=choice == "outside").ops


def num_unmatched(found: list[Detections], references: list[Detections]) -> int:
    pairs = zip(references, found, strict=True)
    return combined(match_detections(a, b, score_threshold=0.05, max_detections=100) for a, b in pairs).num_unmatched


@pytest.fixture(scope="module", params=CHOICES)
def choice(request: pytest.FixtureRequest) -> NmsChoice:
    return request.param


@pytest.fixture(scope="module")
def chosen(choice: NmsChoice, exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> tuple[NmsChoice, Path]:
    """The detector of ``exported`` with another NMS."""
    path = tmp_path_factory.mktemp(choice) / "model.onnx"
    ops = exported_with(choice, exported.detector, exported.signature, path)
    assert "Loop" not in ops
    assert ("NonMaxSuppression" in ops) == (choice == "onnx")
    return choice, path


def test_a_dense_detector_finds_what_detectron2_finds_and_bit_for_bit_what_the_portable_graph_does(
    exported: Exported, chosen: tuple[NmsChoice, Path]
) -> None:
    signature = exported.signature
    images = canvases(signature.canvas_height, signature.canvas_width, 20)
    with (
        OnnxRuntimeRunner(exported.path, signature, num_threads=1) as portable,
        OnnxRuntimeRunner(chosen[1], signature, num_threads=1) as runner,
    ):
        found = [detections for start in (0, 8, 16) for detections in runner.run(np.stack(images[start : start + 8]))]
        expected = [
            detections for start in (0, 8, 16) for detections in portable.run(np.stack(images[start : start + 8]))
        ]
        invariance = batch_invariance(runner, images[:9], score_floor=0.05)
    assert (invariance.num_unmatched, invariance.failed) == (0, ())
    assert num_unmatched(found, [detectron2_detections(exported.detector, image) for image in images]) == 0
    assert sum(map(len, found)) > 1000
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.scores, b.scores)
        np.testing.assert_array_equal(a.labels, b.labels)


@pytest.mark.skipif(
    not hasattr(load_tensorrt(), "ComputeCapability"), reason="TensorRT proper builds only for the GPU it runs on"
)
def test_tensorrt_rtx_refuses_the_operator_by_name_and_builds_a_graph_that_ends_before_it(
    exported: Exported, chosen: tuple[NmsChoice, Path], tmp_path: Path
) -> None:
    choice, path = chosen
    if choice == "outside":
        facts = build_engine(path, tmp_path / "model.plan", exported.signature, compute_capabilities=("89",))
        assert facts.size_bytes > 100_000
        return
    with pytest.raises(
        EngineUnavailable, match=r"no implementation of NonMaxSuppression \(node .*export\.nms=portable"
    ) as error:
        build_engine(path, tmp_path / "model.plan", exported.signature, compute_capabilities=("89",))
    assert error.value.exit_code == 4
    assert not list(tmp_path.iterdir())


def test_proposals_and_boxes_of_a_faster_rcnn_go_through_the_operator_and_match_detectron2(tmp_path: Path) -> None:
    detector = calibrated_rcnn(masks=False)
    signature = signature_for(detector, 128, 192)
    assert exported_with("onnx", detector, signature, tmp_path / "model.onnx")["NonMaxSuppression"] == 2
    images = canvases(128, 192, 6)
    with OnnxRuntimeRunner(tmp_path / "model.onnx", signature, num_threads=1) as runner:
        found = runner.run(np.stack(images))
    assert num_unmatched(found, [detectron2_rcnn_detections(detector, image) for image in images]) == 0
    assert sum(map(len, found)) > 300


def test_a_faster_rcnn_that_ends_at_candidates_matches_detectron2() -> None:
    detector = calibrated_rcnn(masks=False)
    signature = signature_for(detector, 128, 192)
    images = canvases(128, 192, 6)
    with torch.inference_mode():
        candidates = detector_graph(detector, signature, "outside")(torch.from_numpy(np.stack(images)))
    outputs = outputs_from_candidates(
        *(values.numpy() for values in candidates),
        iou_threshold=signature.nms_threshold,
        max_detections=signature.max_detections,
        canvas_height=128,
        canvas_width=192,
    )
    found = detections_from_outputs(outputs)
    assert num_unmatched(found, [detectron2_rcnn_detections(detector, image) for image in images]) == 0
    assert sum(map(len, found)) > 300


def test_masks_follow_nms_so_it_cannot_be_outside() -> None:
    detector = calibrated_rcnn(masks=True)
    with pytest.raises(UnsupportedDetector, match=r"draws masks after NMS.*can be 'portable' or 'onnx'") as error:
        detector_graph(detector, signature_for(detector, 128, 192), "outside")
    assert error.value.exit_code == 2
