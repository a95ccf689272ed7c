"""What paper-style FCOS and ATSS share, with distances and with distributions: losses, inference, and how a matcher is
used. GFL, whose losses are others (test_gfl_detector.py), shares the rest.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dense_detectors import tiny_atss, tiny_distribution_atss, tiny_distribution_fcos, tiny_gfl, tiny_paper_fcos
from detectron2.utils import comm
from location_cases import K, NoWaiting, distances_of, features_of, levels, locations, objects, random_boxes
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, nms, sigmoid_focal_loss

from training.detectors.fcos_matcher import FcosMatcher
from training.detectors.location_detector import LocationDetector
from training.detectors.location_head import LocationHead
from training.detectors.location_losses import giou_loss


def direct_losses(detector: Any, predictions: Any, targets: Any) -> dict[str, Tensor]:
    """The losses location by location where there is an object, in pixels, with torchvision's formulas."""
    logits, values, centerness = (
        torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]) for x in part], dim=1)
        for part in predictions
    )
    distances = values.clamp(min=0)
    if values.shape[2] > 4:
        steps = torch.arange(values.shape[2] // 4).float()
        edges = [edge.softmax(dim=2) @ steps for edge in values.chunk(4, dim=2)]
        distances = torch.stack(edges, dim=2)
    positive = targets.labels != K
    one_hot = nn.functional.one_hot(targets.labels, K + 1)[..., :K].float()
    focal = sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2.0, reduction="sum")
    where = torch.tensor(locations()).expand(len(positive), -1, -1)[positive]
    points, strides = where[:, :2], where[:, 2:]
    boxes = [
        torch.cat([points - edges[:, :2] * strides, points + edges[:, 2:] * strides], dim=1)
        for edges in (distances[positive], targets.distances[positive])
    ]
    weights = targets.centerness[positive]
    giou = (generalized_box_iou_loss(*boxes) * weights).sum()
    bce = nn.functional.binary_cross_entropy_with_logits(centerness[..., 0][positive], weights, reduction="sum")
    count, weight = max(1, int(positive.sum())), max(1.0, float(weights.sum()))
    return {
        "loss_cls": focal / count,
        "loss_box_reg": detector.box_loss_weight * giou / weight,
        "loss_centerness": bce / count,
    }


WITH_CENTERNESS = [tiny_paper_fcos, tiny_atss, tiny_distribution_fcos, tiny_distribution_atss]


@pytest.fixture(params=WITH_CENTERNESS)
def with_centerness(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(params=[*WITH_CENTERNESS, tiny_gfl])
def detector(request: pytest.FixtureRequest) -> Any:
    return request.param()


def test_images_of_a_batch_are_assigned_one_by_one(detector: Any) -> None:
    images = [objects(random_boxes(4, 0)), objects([]), objects(random_boxes(3, 1))]
    together = detector.label_locations(levels(num_images=3), images)
    for index, instances in enumerate(images):
        alone = detector.label_locations(levels(), [instances])
        for name in ("labels", "distances", "centerness"):
            assert torch.equal(getattr(together, name)[index], getattr(alone, name)[0])


@pytest.mark.parametrize("num_objects", [(6, 3), (5, 0), (0, 0)])
def test_the_losses_are_those_of_the_formulas(with_centerness: Any, num_objects: tuple[int, int]) -> None:
    detector, features = with_centerness, features_of()
    for scale in detector.head.scales:
        nn.init.uniform_(scale.scale, 0.5, 2.0)
    nn.init.normal_(detector.head.bbox_pred.weight, std=0.2)
    nn.init.normal_(detector.head.bbox_pred.bias, 1.0)
    predictions = detector.head(features)
    instances = [objects(random_boxes(count, seed)) for seed, count in enumerate(num_objects)]
    targets = detector.label_locations(features, instances)
    found = detector.losses(predictions, targets)
    expected = direct_losses(detector, predictions, targets)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    weights = list(detector.head.parameters())
    grads = [
        torch.autograd.grad(sum(losses.values()), weights, retain_graph=True, allow_unused=True)
        for losses in (found, expected)
    ]
    for name, a, b in zip(dict(detector.head.named_parameters()), *grads, strict=True):
        assert a is not None, f"{name} is cut off"
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-6)


def test_the_giou_of_touching_nested_and_empty_boxes_is_torchvisions_and_its_gradient_finite() -> None:
    edges = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0], [2, 0, 0, 2], [0, 2, 2, 0], [5, 5, 5, 5]])
    a, b = (x.clone().requires_grad_() for x in (edges.repeat_interleave(5, 0), edges.repeat(5, 1)))
    boxes = [torch.cat([-x[:, :2], x[:, 2:]], dim=1) for x in (a, b)]
    positive_area = (boxes[0][:, 2:] > boxes[0][:, :2]).all(1) | (boxes[1][:, 2:] > boxes[1][:, :2]).all(1)
    found = giou_loss(a, b)
    torch.testing.assert_close(found[positive_area], generalized_box_iou_loss(*boxes)[positive_area])
    found.sum().backward()
    assert torch.isfinite(a.grad).all()


def test_assignment_losses_and_backward_never_wait_for_the_device(detector: Any) -> None:
    features = features_of(3)
    instances = [objects(random_boxes(6, 0)), objects([]), objects(random_boxes(2, 1))]
    with NoWaiting():
        losses = detector.forward_training(None, features, detector.head(features), instances)
        sum(losses.values()).backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        float(losses["loss_cls"].detach())


def test_under_bf16_autocast_the_losses_stay_float32_and_near(detector: Any) -> None:
    features, instances = features_of(), [objects(random_boxes(6, 0)), objects(random_boxes(4, 1))]
    exact = detector.forward_training(None, features, detector.head(features), instances)
    with torch.autocast("cpu", torch.bfloat16):
        predictions = detector.head(features)
        assert predictions[0][0].dtype == torch.bfloat16
        found = detector.forward_training(None, features, predictions, instances)
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        assert found[name].item() == pytest.approx(value.item(), rel=0.02)


def naive_inference(detector: Any, predictions: Any, index: int) -> list[tuple[float, int, list[float]]]:
    """Detections of one image by loops: (score, class, box), best first."""
    candidates, position, where = [], 0, locations()
    for level in zip(*predictions, strict=True):
        logits, values, *centerness = (x[index].detach().double() for x in level)
        height, width = logits.shape[1:]
        found = []
        for row in range(height):
            for column in range(width):
                x, y, stride = where[position]
                position += 1
                distances = distances_of(values[:, row, column].tolist())
                left, top, right, bottom = (distance * stride for distance in distances)
                for label in range(K):
                    score = both = logits[label, row, column].sigmoid().item()
                    if score > detector.test_score_thresh:
                        if centerness:
                            both = math.sqrt(score * centerness[0][0, row, column].sigmoid().item())
                        found.append((score, both, label, [x - left, y - top, x + right, y + bottom]))
        candidates += sorted(found, key=lambda c: -c[0])[: detector.test_topk_candidates]
    boxes, scores = torch.tensor([c[3] for c in candidates]), torch.tensor([c[1] for c in candidates])
    labels = torch.tensor([c[2] for c in candidates])
    kept = []
    for label in range(K):
        of_class = (labels == label).nonzero().flatten()
        kept += of_class[nms(boxes[of_class], scores[of_class], detector.test_nms_thresh)].tolist()
    kept.sort(key=lambda i: -scores[i])
    return [(candidates[i][1], candidates[i][2], candidates[i][3]) for i in kept[: detector.max_detections_per_image]]


@pytest.mark.parametrize(("topk", "most"), [(20, 100), (1000, 100), (1000, 10_000)])
def test_detections_are_those_of_a_loop_over_locations_and_classes(detector: Any, topk: int, most: int) -> None:
    detector.test_score_thresh, detector.test_topk_candidates, detector.max_detections_per_image = 0.3, topk, most
    for name in ("cls_score", "bbox_pred", "centerness"):
        if hasattr(detector.head, name):
            nn.init.normal_(getattr(detector.head, name).weight, std=0.2)
    nn.init.constant_(detector.head.cls_score.bias, -3.0)
    images = type("Images", (), {"image_sizes": [(160, 192)] * 2})
    with torch.no_grad():
        features = features_of()
        predictions = detector.head(features)
        results = detector.forward_inference(images, features, predictions)
    for index, found in enumerate(results):
        expected = naive_inference(detector, predictions, index)
        assert len(found) == len(expected) > 20
        assert found.scores.tolist() == pytest.approx([score for score, _, _ in expected], abs=1e-6)
        assert found.pred_classes.tolist() == [label for _, label, _ in expected]
        boxes = torch.tensor([box for _, _, box in expected])
        torch.testing.assert_close(found.pred_boxes.tensor, boxes, rtol=1e-6, atol=1e-4)
        below = found.scores.min() < detector.test_score_thresh  # which is one of the class score alone
        assert below or len(found) == most or topk == 20 or len(predictions) == 2


def test_bounds_that_are_not_one_less_than_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"level_size_bounds has 4 values for 4 levels; give one less"):
        LocationDetector(
            backbone=tiny_paper_fcos().backbone,
            head=LocationHead(channels=32, num_classes=2, num_levels=4, norm_groups=8),
            head_in_features=["p3", "p4", "p5", "p6"],
            matcher=FcosMatcher(),
            num_classes=2,
            pixel_mean=[0.0],
            pixel_std=[1.0],
        )


@pytest.mark.parametrize("num_objects", [2, 0])
def test_the_mean_of_two_processes_losses_is_the_loss_of_the_whole_batch(
    with_centerness: Any, num_objects: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In real processes: tests/training/test_distributed.py."""
    detector = with_centerness
    images = [objects(random_boxes(7, 0)), objects(random_boxes(num_objects, 1))]
    features = features_of()
    whole = detector.losses(detector.head(features), detector.label_locations(features, images))
    shares = [[level[i : i + 1] for level in features] for i in (0, 1)]
    alone = [detector.label_locations(share, [image]) for share, image in zip(shares, images, strict=True)]
    counts = sum(torch.stack([targets.num_positives, targets.sum_centerness]) for targets in alone)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.copy_(counts))
    found = [
        detector.losses(detector.head(share), detector.label_locations(share, [image]))
        for share, image in zip(shares, images, strict=True)
    ]
    for name, loss in whole.items():
        assert (found[0][name] + found[1][name]).item() / 2 == pytest.approx(loss.item(), rel=1e-5), name
