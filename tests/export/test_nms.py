from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn

from export import nms

Scene = tuple[Tensor, Tensor, Tensor]


def scene(num_images: int, num_candidates: int, num_valid: int, num_objects: int, num_classes: int, seed: int) -> Scene:
    """Boxes in clusters, each around one object, unclipped; the clusters share classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(num_images, num_objects, 2, generator=generator) * 300
    sizes = torch.rand(num_images, num_objects, 2, generator=generator) * 80 + 15
    objects = torch.randint(0, num_objects, (num_images, num_candidates), generator=generator)
    jitter = torch.randn(num_images, num_candidates, 4, generator=generator)
    centre = nms.rows(centres, objects) + 8 * jitter[..., :2]
    size = nms.rows(sizes, objects) * torch.exp(0.15 * jitter[..., 2:])
    scores = torch.rand(num_images, num_candidates, generator=generator) * 0.9 + 0.05
    scores[:, torch.randperm(num_candidates, generator=generator)[num_valid:]] = 0
    labels = (objects % num_classes).int()
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1), scores, labels


def greedy(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_detections: int) -> Scene:
    """One image, torchvision's greedy NMS class by class; ties go to the lower index."""
    keep = []
    for label in labels.unique():
        of_class = torch.nonzero((labels == label) & (scores > 0))[:, 0]
        keep.append(of_class[torchvision.ops.nms(boxes[of_class], scores[of_class], iou_threshold)])
    kept = torch.cat(keep).sort().values
    kept = kept[scores[kept].argsort(descending=True, stable=True)][:max_detections]
    return boxes[kept], scores[kept], labels[kept]


def assert_equals_greedy(result: Scene, candidates: Scene, iou_threshold: float, max_detections: int) -> None:
    for image in range(len(candidates[0])):
        expected = greedy(*(x[image] for x in candidates), iou_threshold, max_detections)
        count = len(expected[1])
        for found, wanted in zip(result, expected, strict=True):
            assert torch.equal(found[image, :count], wanted)
            assert not found[image, count:].any()


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
    left = torch.arange(300.0)[None, :] * 10
    boxes = torch.stack([left, torch.zeros_like(left), left + 30, torch.full_like(left, 30)], dim=-1)
    candidates = (boxes, torch.linspace(0.9, 0.1, 300)[None], torch.zeros(1, 300, dtype=torch.int32))
    result = nms.greedy_nms(*candidates, iou_threshold=0.4, max_detections=200)
    assert (result[1] > 0).sum() == 150
    assert_equals_greedy(result, candidates, 0.4, 200)


def test_an_image_without_candidates_gives_empty_slots_beside_an_image_with_more_than_fit() -> None:
    boxes, scores, labels = scene(2, 800, 800, 700, 9, seed=4)
    scores[0] = 0
    result = nms.greedy_nms(boxes, scores, labels, iou_threshold=0.5, max_detections=50)
    assert not any(x[0].any() for x in result)
    assert (result[1][1] > 0).all()
    assert_equals_greedy(tuple(x[1:] for x in result), (boxes[1:], scores[1:], labels[1:]), 0.5, 50)


def test_boxes_without_area_and_an_iou_equal_to_the_threshold_suppress_nothing() -> None:
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 5], [3, 3, 3, 3], [3, 3, 3, 3]]], dtype=torch.float32)
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    candidates = (boxes, scores, torch.zeros(1, 4, dtype=torch.int32))
    result = nms.greedy_nms(*candidates, iou_threshold=0.5, max_detections=10)
    assert (result[1] > 0).sum() == 4
    assert_equals_greedy(result, candidates, 0.5, 10)


class _Nms(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Scene:
        return nms.greedy_nms(boxes, scores, labels, iou_threshold=0.5, max_detections=100)


def test_exported_to_onnx_runtime_it_equals_greedy_nms_in_every_batch_size_with_ties_in_score(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.onnx.export(
        _Nms().eval(),
        scene(2, 1500, 1500, 20, 4, seed=0),
        dynamo=True,
        opset_version=20,
        input_names=["boxes", "scores", "labels"],
        dynamic_shapes=({0: batch}, {0: batch}, {0: batch}),
        verbose=False,
    )
    program.save(tmp_path / "nms.onnx")
    operators = {node.op_type for node in program.model_proto.graph.node}
    assert "Loop" in operators
    assert not operators & {"NonZero", "NonMaxSuppression"}
    session = onnxruntime.InferenceSession(tmp_path / "nms.onnx", providers=["CPUExecutionProvider"])
    for num_images, num_valid, num_objects in ((1, 1500, 20), (2, 0, 20), (3, 1500, 500), (8, 300, 10)):
        boxes, scores, labels = scene(num_images, 1500, num_valid, num_objects, 4, seed=num_images)
        scores = (scores * 40).round() / 40  # at most 40 values: many ties
        outputs = session.run(None, {"boxes": boxes.numpy(), "scores": scores.numpy(), "labels": labels.numpy()})
        if num_valid:
            assert_equals_greedy(tuple(map(torch.from_numpy, outputs)), (boxes, scores, labels), 0.5, 100)
        else:
            assert not any(np.any(output) for output in outputs)
