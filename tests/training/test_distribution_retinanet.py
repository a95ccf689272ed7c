"""RetinaNet with distributions against loops over images, anchors, classes and edges in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_detectors import LEVELS, REG_MAX, tiny_distribution_retinanet
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from location_cases import STRIDES, features_of, objects
from scalar_losses import gradients, overlap, softmax
from torch import Tensor, nn

from training.detectors.distribution_retinanet import DistributionRetinaNet, DistributionRetinaNetHead
from training.detectors.edges import EdgeDistributions

K = 2
SIZE = (64, 96)
BOXES = [[4.0, 6.0, 60.0, 50.0], [30.25, 10.5, 50.0, 31.75], [60.0, 30.0, 77.0, 52.5]]


@pytest.fixture
def detector() -> DistributionRetinaNet:
    """Predicts scores and boxes of all kinds."""
    detector = tiny_distribution_retinanet(K)
    for module in (detector.head.cls_score, detector.head.bbox_pred):
        nn.init.normal_(module.weight, std=0.1)
    nn.init.constant_(detector.head.cls_score.bias, -1.0)
    return detector


def anchors_of(predictions: Any) -> list[tuple[int, int, int, int, int]]:
    """Level, row, column, anchor and stride in detectron2's order."""
    return [
        (level, row, column, anchor, stride)
        for level, stride in enumerate(STRIDES)
        for row in range(predictions[0][level].shape[2])
        for column in range(predictions[0][level].shape[3])
        for anchor in range(9)
    ]


def naive_losses(predictions: Any, labels: list[Tensor], boxes: list[Tensor]) -> dict[str, Any]:
    classes, giou_losses, count = 0.0, 0.0, 0
    for image in range(len(labels)):
        for position, (level, row, column, anchor, stride) in enumerate(anchors_of(predictions)):
            label = int(labels[image][position])
            if label < 0:
                continue
            logits = predictions[0][level][image, anchor * K : (anchor + 1) * K, row, column]
            for index, logit in enumerate(logits):
                score = 1 / (1 + torch.exp(-logit))
                if index == label:
                    classes = classes - 0.25 * (1 - score) ** 2 * torch.log(score)
                else:
                    classes = classes - 0.75 * score**2 * torch.log(1 - score)
            if label == K:
                continue
            count += 1
            values = predictions[1][level][image, :, row, column].reshape(9, 4, REG_MAX + 1)[anchor]
            left, top, right, bottom = (
                sum(step * p for step, p in enumerate(softmax(edge))) * stride for edge in values
            )
            x, y = column * stride, row * stride
            predicted = [x - left, y - top, x + right, y + bottom]
            giou_losses = giou_losses + 1 - overlap(predicted, boxes[image][position].tolist())[1]
    divisor = 0.9 * 100 + 0.1 * max(count, 1)  # detectron2's running number, in its first step
    return {"loss_cls": classes / divisor, "loss_box_reg": 2.0 * giou_losses / divisor}


@pytest.mark.parametrize("images", [[BOXES, []], [[]]])
def test_losses_and_gradients_are_those_of_loops(detector: DistributionRetinaNet, images: list[Any]) -> None:
    features = features_of(len(images), size=SIZE)
    instances = [objects(boxes, [i % K for i in range(len(boxes))]) for boxes in images]
    predictions = detector.head(features)
    leaves = [[level.detach().double().requires_grad_() for level in part] for part in predictions]
    labels, boxes = detector.label_anchors(detector.anchor_generator(features), instances)
    with EventStorage():
        found = detector.forward_training(None, features, predictions, instances)
    expected = naive_losses(leaves, labels, boxes)
    assert found.keys() == expected.keys()
    if any(images):
        stacked = torch.stack(labels)
        assert int((stacked == -1).sum()) > 5, "anchors that neither learn an object nor background"
        assert int(((stacked >= 0) & (stacked < K)).sum()) > 5
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(torch.as_tensor(value).item(), rel=1e-5), name
        for ours, theirs in zip(gradients(found[name], predictions), gradients(value, leaves), strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-7, msg=name)


def test_an_anchors_box_lies_as_many_strides_around_its_centre_as_its_distributions_say(
    detector: DistributionRetinaNet,
) -> None:
    features = features_of(num_images=1, size=SIZE)
    logits, values = ([torch.full_like(level, -50.0) for level in part] for part in detector.head(features))
    expected = {}
    for level, stride in enumerate(STRIDES):
        anchor, label, row, column = 2 * level, level % K, features[level].shape[2] - 1, 0
        logits[level][0, anchor * K + label, row, column] = 3.0 - level / 10
        for edge, step in enumerate((1, 2, 4, 7)):
            values[level][0, (anchor * 4 + edge) * (REG_MAX + 1) + step, row, column] = 50.0
        y = row * stride
        expected[3.0 - level / 10] = (label, [-stride, y - 2 * stride, 4 * stride, y + 7 * stride])
    images = type("Images", (), {"image_sizes": [SIZE]})
    detector.test_nms_thresh = 1.0
    found = detector.forward_inference(images, features, [logits, values])[0]
    assert found.scores.logit().tolist() == pytest.approx(list(expected), abs=1e-4)
    assert found.pred_classes.tolist() == [label for label, _ in expected.values()]
    for box, (_, wanted) in zip(found.pred_boxes.tensor, expected.values(), strict=True):
        assert box.tolist() == pytest.approx(wanted)


def test_the_head_is_retinanets_with_reg_max_plus_one_values_in_place_of_each_delta() -> None:
    shapes = [ShapeSpec(channels=64)] * len(LEVELS)
    head = DistributionRetinaNetHead(input_shape=shapes, num_classes=3, num_anchors=9, conv_dims=[64, 64])
    assert isinstance(head.edges, EdgeDistributions)
    assert head.bbox_pred.out_channels == 9 * 4 * 17
    assert head.cls_score.out_channels == 9 * 3
    assert head.bbox_pred.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not head.bbox_pred.bias.any()
    _, values = head([torch.randn(1, 64, 2, 2)] * len(LEVELS))
    assert values[0].min() < 0, "raw logits, which localisation distillation compares"


def test_a_reg_max_that_leaves_no_distance_is_refused() -> None:
    shapes = [ShapeSpec(channels=32)] * len(LEVELS)
    with pytest.raises(ValueError, match="reg_max is 0, expected a whole number of 1 or more"):
        DistributionRetinaNetHead(input_shape=shapes, num_classes=2, num_anchors=9, conv_dims=[32], reg_max=0)
