from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_detectors import DENSE
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from training.detection_losses import (
    UnsupportedStudent,
    detection_losses,
    distilled_levels,
    label_assignment,
    loss_normalizer,
    same_loss_normalizer,
    set_loss_normalizer,
)


def batch(num_images: int = 2, with_empty: bool = True) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for index in range(num_images):
        instances = Instances((96, 128))
        boxes = torch.tensor([[8.0, 8.0, 60.0, 50.0], [70.0, 20.0, 120.0, 90.0], [30.0, 40.0, 45.0, 60.0]])
        if with_empty and index == num_images - 1:
            boxes = boxes[:0]
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.arange(len(boxes)) % 3
        image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=generator)
        inputs.append({"image": image, "instances": instances})
    return inputs


def tiny_faster_rcnn() -> nn.Module:
    config = get_cfg()
    config.MODEL.DEVICE = "cpu"
    config.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    config.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    config.MODEL.RESNETS.DEPTH = 18
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    config.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    config.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    config.MODEL.FPN.OUT_CHANNELS = 32
    config.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    config.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    config.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 100
    config.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    config.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    config.MODEL.ROI_HEADS.NUM_CLASSES = 5
    config.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    config.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    config.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    config.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    config.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    torch.manual_seed(0)
    return build_model(config)


FAMILIES = {**DENSE, "Faster R-CNN": tiny_faster_rcnn}


@pytest.fixture(params=FAMILIES)
def detector(request: pytest.FixtureRequest) -> nn.Module:
    return FAMILIES[request.param]().train()


@pytest.fixture(params=DENSE)
def dense(request: pytest.FixtureRequest) -> nn.Module:
    return DENSE[request.param]().train()


def test_on_the_backbones_own_features_the_losses_equal_the_stock_forward(detector: nn.Module) -> None:
    inputs = batch()
    with EventStorage():
        torch.manual_seed(1)  # two-stage detectors sample proposals
        expected = detector(inputs)
        if hasattr(detector, "loss_normalizer"):
            del detector.loss_normalizer
        torch.manual_seed(1)
        images = detector.preprocess_image(inputs)
        features = detector.backbone(images.tensor)
        found = detection_losses(detector, images, features, [x["instances"] for x in inputs])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_given_the_assignment_the_losses_equal_the_stock_forward(detector: nn.Module) -> None:
    inputs = batch()
    instances = [x["instances"] for x in inputs]
    with EventStorage():
        torch.manual_seed(1)
        expected = detector(inputs)
        set_loss_normalizer(detector, None)
        torch.manual_seed(1)
        images = detector.preprocess_image(inputs)
        features = detector.backbone(images.tensor)
        assigned = label_assignment(detector, features, instances)
        found = detection_losses(detector, images, features, instances, assigned)
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}


def test_the_assignment_serves_other_features_of_the_same_sizes_and_is_made_once(
    dense: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = batch()
    instances = [x["instances"] for x in inputs]
    name = "label_anchors" if hasattr(dense, "label_anchors") else "label_locations"
    calls = []
    assign = getattr(dense, name)
    monkeypatch.setattr(dense, name, lambda *args: calls.append(name) or assign(*args))
    with EventStorage():
        images = dense.preprocess_image(inputs)
        features = dense.backbone(images.tensor)
        others = {level: torch.randn_like(feature) for level, feature in features.items()}
        assigned = label_assignment(dense, features, instances)
        for given in (features, others, others):
            set_loss_normalizer(dense, None)
            found = detection_losses(dense, images, given, instances, assigned)
        assert calls == [name]
        set_loss_normalizer(dense, None)
        expected = dense.forward_training(
            images, [others[x] for x in dense.head_in_features], dense.head(list(others.values())), instances
        )
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}


def test_a_two_stage_detector_has_no_assignment_to_use_twice() -> None:
    assert label_assignment(tiny_faster_rcnn(), {}, []) is None


def test_a_dense_detector_without_a_rule_of_its_own_trains_by_its_own_forward(tiny_retinanet: nn.Module) -> None:
    class Other(DenseDetector):
        def forward_training(self, images, features, predictions, gt_instances):  # type: ignore[no-untyped-def]
            return {"loss": predictions[0][0].sum()}

    detector = Other(
        tiny_retinanet.backbone, tiny_retinanet.head, ["p3", "p4", "p5", "p6", "p7"], pixel_mean=[0.0], pixel_std=[1.0]
    )
    inputs = batch()
    images = tiny_retinanet.preprocess_image(inputs)
    features = detector.backbone(images.tensor)
    assigned = label_assignment(detector, features, [])
    found = detection_losses(detector, images, features, [], assigned)
    assert found["loss"].item() == tiny_retinanet.head([features["p3"]] * 5)[0][0].sum().item()


def test_a_batch_without_objects_has_finite_losses_that_reach_the_head(dense: nn.Module) -> None:
    inputs = [{**x, "instances": x["instances"][torch.zeros(len(x["instances"]), dtype=torch.bool)]} for x in batch()]
    with EventStorage():
        losses = dense(inputs)
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in dense.head.parameters())


@pytest.mark.parametrize("family", ["RetinaNet", "FCOS", "DistributionRetinaNet"])
def test_a_second_pass_uses_the_same_loss_normalizer_and_leaves_no_trace(family: str) -> None:
    detector, inputs = DENSE[family]().train(), batch()
    with EventStorage():
        images = detector.preprocess_image(inputs)
        features = detector.backbone(images.tensor)
        instances = [x["instances"] for x in inputs]
        for _ in range(2):  # the first iteration has no normaliser yet
            before = loss_normalizer(detector)
            assigned = label_assignment(detector, features, instances)
            first = detection_losses(detector, images, features, instances, assigned)
            after = loss_normalizer(detector)
            with same_loss_normalizer(detector, before):
                second = detection_losses(detector, images, features, instances, assigned)
            assert loss_normalizer(detector) == after
            assert after != before
            assert {k: v.item() for k, v in first.items()} == {k: v.item() for k, v in second.items()}


def test_the_levels_of_dense_detectors_are_the_heads_and_of_two_stage_ones_the_whole_pyramid(dense: nn.Module) -> None:
    assert distilled_levels(dense) == ("p3", "p4", "p5", "p6", "p7")
    assert distilled_levels(tiny_faster_rcnn()) == ("p2", "p3", "p4", "p5", "p6")


def test_an_unknown_detector_is_refused_with_the_supported_families() -> None:
    families = "DenseDetector, FCOS, GeneralizedRCNN, LocationBase, RetinaNet"
    with pytest.raises(UnsupportedStudent, match=f"Linear; supported: {families} and subclasses") as error:
        detection_losses(nn.Linear(1, 1), None, {}, [])
    assert error.value.exit_code == 2
    with pytest.raises(UnsupportedStudent, match="supported: DenseDetector, GeneralizedRCNN and subclasses"):
        distilled_levels(nn.Linear(1, 1))
