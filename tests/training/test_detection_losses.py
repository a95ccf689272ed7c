from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from training.detection_losses import (
    detection_losses,
    distilled_levels,
    loss_normalizer,
    same_loss_normalizer,
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


def tiny_fcos(retinanet: nn.Module) -> FCOS:
    torch.manual_seed(0)
    return FCOS(
        backbone=retinanet.backbone,
        head=FCOSHead(input_shape=[ShapeSpec(channels=32)] * 5, num_classes=5, conv_dims=[32]),
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        num_classes=5,
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
    )


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


@pytest.fixture(params=["RetinaNet", "FCOS", "Faster R-CNN"])
def detector(request: pytest.FixtureRequest, tiny_retinanet: nn.Module) -> nn.Module:
    if request.param == "RetinaNet":
        return tiny_retinanet.train()
    if request.param == "FCOS":
        return tiny_fcos(tiny_retinanet).train()
    return tiny_faster_rcnn().train()


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


def test_a_second_pass_uses_the_same_loss_normalizer_and_leaves_no_trace(tiny_retinanet: nn.Module) -> None:
    detector, inputs = tiny_retinanet.train(), batch()
    with EventStorage():
        images = detector.preprocess_image(inputs)
        features = detector.backbone(images.tensor)
        instances = [x["instances"] for x in inputs]
        for _ in range(2):  # the first iteration has no normaliser yet
            before = loss_normalizer(detector)
            first = detection_losses(detector, images, features, instances)
            after = loss_normalizer(detector)
            with same_loss_normalizer(detector, before):
                second = detection_losses(detector, images, features, instances)
            assert loss_normalizer(detector) == after
            assert after != before
            assert {k: v.item() for k, v in first.items()} == {k: v.item() for k, v in second.items()}


def test_the_levels_of_dense_detectors_are_the_heads_and_of_two_stage_ones_the_whole_pyramid(
    tiny_retinanet: nn.Module,
) -> None:
    assert distilled_levels(tiny_retinanet) == ("p3", "p4", "p5", "p6", "p7")
    assert distilled_levels(tiny_faster_rcnn()) == ("p2", "p3", "p4", "p5", "p6")


def test_an_unknown_detector_is_refused_with_the_supported_families() -> None:
    with pytest.raises(TypeError, match=r"Linear; supported: DenseDetector, GeneralizedRCNN"):
        detection_losses(nn.Linear(1, 1), None, {}, [])
