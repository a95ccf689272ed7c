from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from export import nms
from export.candidate_nms import outputs_from_candidates
from export.graph_parts import nms_of
from export.onnx_nms import TRANSLATIONS
from tests.export.nms_scenes import Scene, assert_equals_greedy, greedy, scene
from tests.serving.pixel_means import make_signature


@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.6])
@pytest.mark.parametrize(
    ("num_candidates", "num_valid", "num_objects", "num_classes"),
    [(1500, 1500, 3, 1), (1500, 1500, 20, 80), (1500, 200, 20, 3), (700, 700, 400, 5), (40, 40, 4, 2), (5, 3, 2, 2)],
)
def test_the_result_equals_greedy_class_wise_nms(
    num_candidates: int, num_valid: int, num_objects: int, num_classes: int, iou_threshold: float
) -> None:
    candidates = scene(3, num_candidates, num_valid, num_objects, num_classes, seed=num_candidates + num_objects)
    result = nms.greedy_nms(*candidates, iou_threshold=iou_threshold, max_detections=100)
    assert_equals_greedy(result, candidates, iou_threshold, 100)


def test_a_chain_where_each_box_overlaps_only_its_neighbours_keeps_every_other_box() -> None:
    result = nms.greedy_nms(*chain(300), iou_threshold=0.4, max_detections=200)
    assert (result[1] > 0).sum() == 150
    assert_equals_greedy(result, chain(300), 0.4, 200)


def test_an_image_without_candidates_gives_empty_slots_beside_an_image_with_more_than_fit() -> None:
    boxes, scores, labels = scene(2, 800, 800, 700, 9, seed=4)
    scores[0] = 0
    result = nms.greedy_nms(boxes, scores, labels, iou_threshold=0.5, max_detections=50)
    assert not any(x[0].any() for x in result)
    assert (result[1][1] > 0).all()
    assert_equals_greedy(tuple(x[1:] for x in result), (boxes[1:], scores[1:], labels[1:]), 0.5, 50)


def test_boxes_without_area_and_an_iou_equal_to_the_threshold_suppress_nothing() -> None:
    result = nms.greedy_nms(*without_area(), iou_threshold=0.5, max_detections=10)
    assert (result[1] > 0).sum() == 4
    assert_equals_greedy(result, without_area(), 0.5, 10)


def chain(num_boxes: int) -> Scene:
    """Each box overlaps its neighbours alone, all of one class."""
    left = torch.arange(float(num_boxes))[None, :] * 10
    boxes = torch.stack([left, torch.zeros_like(left), left + 30, torch.full_like(left, 30)], dim=-1)
    return boxes, torch.linspace(0.9, 0.1, num_boxes)[None], torch.zeros(1, num_boxes, dtype=torch.int32)


def with_ties(candidates: Scene) -> Scene:
    """The scene with at most 40 different scores."""
    boxes, scores, labels = candidates
    return boxes, (scores * 40).round() / 40, labels


def without_area() -> Scene:
    """Boxes without area, and two whose IoU is one half."""
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 5], [3, 3, 3, 3], [3, 3, 3, 3]]], dtype=torch.float32)
    return boxes, torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.zeros(1, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    "candidates",
    [
        scene(3, 1500, 1500, 3, 1, seed=0),
        scene(3, 1500, 1500, 20, 80, seed=1),
        with_ties(scene(3, 1500, 1500, 500, 4, seed=2)),
        scene(2, 1500, 0, 20, 4, seed=3),
        scene(2, 40, 30, 9, 2, seed=4),
        chain(300),
        without_area(),
    ],
    ids=["crowded", "many classes", "ties and more than fit", "nothing", "fewer than fit", "chain", "without area"],
)
@pytest.mark.parametrize("iou_threshold", [0.5, 0.6])
def test_outside_the_graph_the_outputs_are_those_of_a_graph_with_nms_inside(
    candidates: Scene, iou_threshold: float
) -> None:
    height, width = 250, 300  # cuts off and empties boxes
    found = outputs_from_candidates(
        *(values.numpy() for values in candidates),
        iou_threshold=iou_threshold,
        max_detections=100,
        canvas_height=height,
        canvas_width=width,
    )
    assert tuple(found) == make_signature().output_names
    assert [values.dtype for values in found.values()] == [np.int32, np.float32, np.float32, np.int32]
    for image in range(len(candidates[0])):
        boxes, scores, labels = greedy(*(values[image] for values in candidates), iou_threshold, 100)
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height]))
        nonempty = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
        count = int(found["num_detections"][image, 0])
        assert count == nonempty.sum()
        for name, values in (("boxes", boxes), ("scores", scores), ("labels", labels)):
            np.testing.assert_array_equal(found[name][image, :count], values[nonempty].numpy(), err_msg=name)
            assert not found[name][image, count:].any()


class _Nms(nn.Module):
    def __init__(self, choice: Literal["portable", "onnx"], iou_threshold: float) -> None:
        super().__init__()
        self.nms = nms_of(choice, num_classes=4)
        self.iou_threshold = iou_threshold

    def forward(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Scene:
        assert self.nms is not None
        return self.nms(boxes, scores, labels, iou_threshold=self.iou_threshold, max_detections=100)


def exported_nms(
    path: Path, choice: Literal["portable", "onnx"], num_candidates: int, iou_threshold: float = 0.5
) -> tuple[onnxruntime.InferenceSession, set[str]]:
    """A session of the NMS alone, for batches of up to 8, and the operators of its main graph."""
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.onnx.export(
        _Nms(choice, iou_threshold).eval(),
        scene(2, num_candidates, num_candidates, 20, 4, seed=0),
        dynamo=True,
        opset_version=20,
        input_names=["boxes", "scores", "labels"],
        dynamic_shapes=({0: batch}, {0: batch}, {0: batch}),
        custom_translation_table=TRANSLATIONS,
        verbose=False,
    )
    assert program is not None
    program.save(path)
    operators = {node.op_type for node in program.model_proto.graph.node}
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), operators


def run(session: onnxruntime.InferenceSession, candidates: Scene) -> Scene:
    names = ("boxes", "scores", "labels")
    feeds = {name: values.numpy() for name, values in zip(names, candidates, strict=True)}
    boxes, scores, labels = map(torch.from_numpy, session.run(None, feeds))
    return boxes, scores, labels


@pytest.mark.parametrize("choice", ["portable", "onnx"])
def test_exported_to_onnx_runtime_it_equals_greedy_nms_in_every_batch_size_with_ties_in_score(
    tmp_path: Path, choice: Literal["portable", "onnx"]
) -> None:
    session, operators = exported_nms(tmp_path / "nms.onnx", choice, 1500)
    assert ("Loop" in operators, "NonMaxSuppression" in operators) == (choice == "portable", choice == "onnx")
    assert "NonZero" not in operators
    for num_images, num_valid, num_objects in ((1, 1500, 20), (2, 0, 20), (3, 1500, 500), (8, 300, 10)):
        candidates = with_ties(scene(num_images, 1500, num_valid, num_objects, 4, seed=num_images))
        result = run(session, candidates)
        if num_valid:
            assert_equals_greedy(result, candidates, 0.5, 100)
        else:
            assert not any(values.any() for values in result)


def test_the_onnx_operator_does_the_same_at_the_threshold_in_chains_and_with_fewer_candidates_than_slots(
    tmp_path: Path,
) -> None:
    few, _ = exported_nms(tmp_path / "few.onnx", "onnx", 4)
    result = run(few, without_area())
    assert (result[1] > 0).sum() == 4
    assert_equals_greedy(result, without_area(), 0.5, 100)
    many, _ = exported_nms(tmp_path / "many.onnx", "onnx", 300, iou_threshold=0.6)  # which float32 cannot hold
    for candidates in (chain(300), scene(2, 300, 300, 5, 4, seed=5), scene(2, 300, 250, 250, 4, seed=6)):
        assert_equals_greedy(run(many, candidates), candidates, 0.6, 100)
    image_without, image_with = scene(1, 300, 0, 5, 4, seed=7), scene(1, 300, 300, 290, 4, seed=8)
    together = tuple(torch.cat(pair) for pair in zip(image_without, image_with, strict=True))
    boxes, scores, labels = run(many, together)
    assert not any(values[0].any() for values in (boxes, scores, labels))
    assert (scores[1] > 0).all()
    assert_equals_greedy((boxes[1:], scores[1:], labels[1:]), image_with, 0.6, 100)
