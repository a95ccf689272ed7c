"""GFL's losses against loops over images, locations, classes and edges in double precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dense_detectors import tiny_gfl
from detectron2.utils import comm
from location_cases import K, features_of, locations, objects
from scalar_losses import gradients, overlap, softmax
from torch import Tensor, nn

from training.detectors.edges import EdgeDistributions
from training.detectors.gfl_detector import GflDetector
from training.detectors.location_head import GflHead
from training.detectors.locations import LocationTargets

SIZE = (64, 96)
BOXES = [[4.0, 6.0, 60.0, 50.0], [30.25, 10.5, 50.0, 21.75], [2.0, 2.0, 94.0, 62.0], [70.0, 40.0, 77.0, 52.5]]
OBJECTS = {
    "objects in both images": [BOXES[:3], BOXES[1:]],
    "objects in one image": [BOXES, []],
    "no objects": [[], []],
}


def detector_with(reg_max: int) -> GflDetector:
    """Predicts scores and boxes of all kinds, each level at a scale of its own."""
    detector = tiny_gfl()
    torch.manual_seed(3)
    detector.head = GflHead(channels=32, num_classes=K, num_convs=1, norm_groups=8, reg_max=reg_max)
    for module in (detector.head.cls_score, detector.head.bbox_pred):
        nn.init.normal_(module.weight, std=0.1)
    nn.init.constant_(detector.head.cls_score.bias, -1.0)
    for scale in detector.head.scales:
        nn.init.uniform_(scale.scale, 0.5, 2.0)
    return detector


def location_losses(
    logits: Tensor, values: Tensor, where: tuple[float, float, int], label: int, target: list[float]
) -> tuple[Any, Any, Any, float]:
    """Of one location: quality focal loss, weighted box loss, weighted distribution focal loss, weight."""
    scores = [1 / (1 + torch.exp(-logit)) for logit in logits]
    if label == K:
        return sum(-torch.log(1 - score) * score**2 for score in scores), 0.0, 0.0, 0.0
    x, y, stride = where
    distributions = [softmax(edge) for edge in values.reshape(4, -1)]
    distances = [sum(step * p for step, p in enumerate(edge)) * stride for edge in distributions]
    boxes = [
        [x - left, y - top, x + right, y + bottom]
        for left, top, right, bottom in (distances, [distance * stride for distance in target])
    ]
    quality, giou = overlap(*boxes)
    quality, weight = quality.item(), max(scores).item()
    classes = 0.0
    for index, score in enumerate(scores):
        wanted = quality if index == label else 0.0
        entropy = -wanted * torch.log(score) - (1 - wanted) * torch.log(1 - score)
        classes = classes + entropy * abs(wanted - score) ** 2
    steps = 0.0
    for edge, distance in zip(distributions, target, strict=True):
        distance = min(distance, len(edge) - 1 - 0.1)
        before = math.floor(distance)
        after = before + 1
        nearness = (after - distance, distance - before)
        steps = steps - (nearness[0] * torch.log(edge[before]) + nearness[1] * torch.log(edge[after])) / 4
    return classes, weight * (1 - giou), weight * steps, weight


def naive_losses(predictions: tuple[list[Tensor], list[Tensor]], targets: LocationTargets) -> dict[str, Any]:
    classes, boxes, steps, weights, count = 0.0, 0.0, 0.0, 0.0, 0
    for image in range(len(targets.labels)):
        position, where = 0, locations(*SIZE)
        for logits, values in zip(*predictions, strict=True):
            for row in range(logits.shape[2]):
                for column in range(logits.shape[3]):
                    label = int(targets.labels[image, position])
                    found = location_losses(
                        logits[image, :, row, column],
                        values[image, :, row, column],
                        where[position],
                        label,
                        targets.distances[image, position].tolist(),
                    )
                    classes, boxes, steps = classes + found[0], boxes + found[1], steps + found[2]
                    weights += found[3]
                    count += label != K
                    position += 1
    divisor = weights or 1.0
    return {
        "loss_cls": classes / max(count, 1),
        "loss_box_reg": 2.0 * boxes / divisor,
        "loss_dfl": 0.25 * steps / divisor,
    }


@pytest.mark.parametrize("case", OBJECTS)
@pytest.mark.parametrize("reg_max", [8, 2])
def test_losses_and_gradients_are_those_of_loops(reg_max: int, case: str) -> None:
    detector, features = detector_with(reg_max), features_of(size=SIZE)
    targets = detector.label_locations(features, [objects(boxes) for boxes in OBJECTS[case]])
    predictions = detector.head(features)
    leaves = [[level.detach().double().requires_grad_() for level in part] for part in predictions]
    found, expected = detector.losses(predictions, targets), naive_losses(leaves, targets)
    assert found.keys() == expected.keys()
    num_positives = int((targets.labels != K).sum())
    assert (num_positives > 8) is (case != "no objects")
    assert bool((targets.distances > reg_max - 0.1).any()) is (reg_max == 2 and num_positives > 0)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(torch.as_tensor(value).item(), rel=1e-5), name
        for ours, theirs in zip(gradients(found[name], predictions), gradients(value, leaves), strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-7, msg=name)


def test_every_weight_of_the_head_learns_and_is_connected_without_objects() -> None:
    detector, features = detector_with(8), features_of(size=SIZE)
    for instances in ([objects(BOXES), objects([])], [objects([]), objects([])]):
        detector.zero_grad()
        losses = detector.forward_training(None, features, detector.head(features), instances)
        sum(losses.values()).backward()
        for name, parameter in detector.head.named_parameters():
            assert parameter.grad is not None, f"{name} is cut off"
            assert parameter.grad.isfinite().all(), name
            # A level without an object learns no scale.
            assert parameter.grad.any() or not len(instances[0]) or name.startswith("scales"), name


def test_the_weights_of_box_and_distribution_losses_give_the_scores_no_gradient() -> None:
    detector, features = detector_with(8), features_of(size=SIZE)
    logits, values = detector.head(features)
    losses = detector.losses((logits, values), detector.label_locations(features, [objects(BOXES)] * 2))
    for name, loss in losses.items():
        of_logits, of_values = (
            torch.autograd.grad(loss, part, retain_graph=True, allow_unused=True) for part in (logits, values)
        )
        assert any(g is not None and g.any() for g in of_logits) is (name == "loss_cls")
        assert any(g is not None and g.any() for g in of_values) is (name != "loss_cls")


def test_scores_that_vanish_leave_finite_losses() -> None:
    detector, features = detector_with(8), features_of(size=SIZE)
    nn.init.constant_(detector.head.cls_score.bias, -200.0)
    losses = detector.forward_training(None, features, detector.head(features), [objects(BOXES)] * 2)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in detector.head.parameters())


@pytest.mark.parametrize("case", ["objects in both images", "objects in one image"])
def test_the_mean_of_two_processes_losses_is_the_loss_of_the_whole_batch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In real processes: tests/training/test_distributed.py."""
    detector, features = detector_with(8), features_of(size=SIZE)
    images = [objects(boxes) for boxes in OBJECTS[case]]
    targets = detector.label_locations(features, images)
    logits, values = detector.head(features)
    whole = detector.losses((logits, values), targets)
    scores = torch.cat([level.flatten(2) for level in logits], dim=2).detach().sigmoid().amax(dim=1)
    sums = {
        (2,): torch.stack([targets.num_positives, targets.sum_centerness]),
        (): scores[targets.labels != K].sum(),
    }
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.copy_(sums[tuple(values.shape)]))
    found = []
    for index in (0, 1):
        share = [level[index : index + 1] for level in features]
        assigned = detector.label_locations(share, images[index : index + 1])
        found.append(detector.losses(detector.head(share), assigned))
    for name, loss in whole.items():
        assert (found[0][name] + found[1][name]).item() / 2 == pytest.approx(loss.item(), rel=1e-5), name


def test_a_perfect_head_has_no_loss_but_the_entropy_of_distances_between_two_steps() -> None:
    detector, features = detector_with(8), features_of(num_images=1, size=SIZE)
    box = [8.0, 8.0, 40.0, 40.0]
    targets = detector.label_locations(features, [objects([box], [2])])
    logits = [torch.full((1, K, *x.shape[2:]), -40.0) for x in features]
    values = [torch.full((1, 36, *x.shape[2:]), -40.0) for x in features]
    position = 0
    for level_logits, level_values in zip(logits, values, strict=True):
        for row in range(level_logits.shape[2]):
            for column in range(level_logits.shape[3]):
                if targets.labels[0, position] != K:
                    level_logits[0, 2, row, column] = 40.0
                    for edge, distance in enumerate(targets.distances[0, position].tolist()):
                        assert distance % 1 in (0, 0.25, 0.5, 0.75)
                        before = math.floor(distance)
                        for step, share in ((before, before + 1 - distance), (before + 1, distance - before)):
                            if share:
                                level_values[0, 9 * edge + step, row, column] = math.log(share)
                position += 1
    losses = detector.losses((logits, values), targets)
    assert int((targets.labels != K).sum()) > 3
    assert losses["loss_cls"].item() == pytest.approx(0, abs=1e-6)
    assert losses["loss_box_reg"].item() == pytest.approx(0, abs=1e-5)
    between = targets.distances[targets.labels != K] % 1
    entropy = -(torch.xlogy(between, between) + torch.xlogy(1 - between, 1 - between)).mean()
    assert losses["loss_dfl"].item() == pytest.approx(0.25 * entropy.item(), abs=1e-5)


def test_the_settings_are_those_of_the_paper() -> None:
    detector = tiny_gfl()
    assert (detector.quality_focal_beta, detector.box_loss_weight, detector.distribution_loss_weight) == (2, 2, 0.25)
    assert (detector.test_score_thresh, detector.test_nms_thresh) == (0.05, 0.6)
    edges = GflHead(channels=64, num_classes=2).edges
    assert isinstance(edges, EdgeDistributions)
    assert edges.reg_max == 16
