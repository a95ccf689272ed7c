"""The trees of Faster and Mask R-CNN against detectron2's own configuration files."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from omegaconf import ListConfig
from torch import nn

from pipeline.recipe_parts import faster_rcnn, mask_rcnn, resnet
from training.student import build_student

CONFIGS = {
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml": faster_rcnn,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml": mask_rcnn,
}


def config_of(name: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(name))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64  # as large as a test can be
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    return cfg


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Every number, text and list of such that the modules of a detector hold, by the module's name."""
    settings = {}
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if not key.startswith("_"):
                with contextlib.suppress(TypeError):  # submodules, functions
                    settings[f"{name}.{key}"] = json.loads(json.dumps(value, default=_plain))
    return settings


def _plain(value: object) -> list[Any]:
    if isinstance(value, ListConfig):
        return list(value)
    raise TypeError


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_defaults_are_base_rcnn_fpns(name: str) -> None:
    bottom_up = resnet(18, out_features=("res2", "res3", "res4", "res5"))
    ours = build_student(CONFIGS[name](bottom_up), num_classes=7)
    theirs = build_model(config_of(name))
    state = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == state
    ours.load_state_dict(theirs.state_dict(), strict=True)
    found, expected = settings_of(ours), settings_of(theirs)
    # The same weights: what is not named has 1.
    assert expected.pop("roi_heads.box_predictor.loss_weight") == {"loss_box_reg": 1.0}
    assert set(found.pop("roi_heads.box_predictor.loss_weight").values()) == {1.0}
    assert len(expected) > 300
    assert {key: (value, found.get(key)) for key, value in expected.items() if found.get(key) != value} == {}
    for part in ("proposal_generator.anchor_matcher", "roi_heads.proposal_matcher"):
        a, b = (dict(vars(_attribute(detector, part))) for detector in (ours, theirs))
        assert a == b
    for part in ("proposal_generator.box2box_transform", "roi_heads.box_predictor.box2box_transform"):
        a, b = (tuple(_attribute(detector, part).weights) for detector in (ours, theirs))
        assert a == b
    image = {"image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)}
    with torch.no_grad():
        a, b = (detector.eval()([image])[0]["instances"].get_fields() for detector in (ours, theirs))
    assert set(a) == set(b)
    torch.testing.assert_close(a["scores"], b["scores"], atol=0, rtol=0)
    torch.testing.assert_close(a["pred_boxes"].tensor, b["pred_boxes"].tensor, atol=0, rtol=0)


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def test_the_number_of_classes_reaches_every_head() -> None:
    student = build_student(mask_rcnn(resnet(18, out_features=("res2", "res3", "res4", "res5")), channels=32), 3)
    heads = student.roi_heads
    assert heads.box_predictor.cls_score.out_features == 4
    assert heads.box_predictor.bbox_pred.out_features == 12
    assert heads.mask_head.predictor.out_channels == 3
