"""Small detectors of detectron2's model zoo as a user has them: a configuration file and a checkpoint that detects."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.model_zoo import get_config_file
from detectron2.modeling import build_model
from torch import nn

from pipeline.__main__ import main
from tests.calibration import calibrate
from tests.export.conftest import canvases

_SMALL = """
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64}
  FPN: {OUT_CHANNELS: 16}
"""
_SMALL_HEADS = """
  RPN: {PRE_NMS_TOPK_TEST: 100, POST_NMS_TOPK_TEST: 60}
  ROI_HEADS: {NUM_CLASSES: 3}
  ROI_BOX_HEAD: {FC_DIM: 32}
"""
_SIZE = """
INPUT: {MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 130}
"""
YAML = {
    "RetinaNet": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        _SMALL + "  RETINANET: {NUM_CLASSES: 3, NUM_CONVS: 1, TOPK_CANDIDATES_TEST: 200}",
    ),
    "Faster R-CNN": ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", _SMALL + _SMALL_HEADS),
    "Mask R-CNN": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        _SMALL + _SMALL_HEADS + "  ROI_MASK_HEAD: {NUM_CONV: 1, CONV_DIM: 16}",
    ),
}
_LAZY_SIZE = """
dataloader.test.mapper.augmentations[0].short_edge_length = 96
dataloader.test.mapper.augmentations[0].max_size = 130
model.backbone.bottom_up.stages.depth = 18
del model.backbone.bottom_up.stages.stride_in_1x1
model.backbone.out_channels = 16
"""
LAZY = {
    "FCOS, LazyConfig": (
        "COCO-Detection/fcos_R_50_FPN_1x.py",
        """
model.num_classes = 3
model.backbone.top_block.in_channels = 16
model.head.update(input_shape=[ShapeSpec(channels=16)] * 5, conv_dims=[16], norm="")
""",
    ),
    "Mask R-CNN, LazyConfig": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
        """
heads, rpn = model.roi_heads, model.proposal_generator
rpn.head.in_channels, rpn.pre_nms_topk, rpn.post_nms_topk = 16, (100, 100), (60, 60)
heads.num_classes = 3
heads.box_head.update(input_shape=ShapeSpec(channels=16, height=7, width=7), fc_dims=[32])
heads.box_predictor.input_shape = ShapeSpec(channels=32)
heads.mask_head.update(input_shape=ShapeSpec(channels=16, height=14, width=14), conv_dims=[16, 16])
""",
    ),
}
FAMILIES = (*YAML, *LAZY)


@dataclasses.dataclass(frozen=True)
class OwnModel:
    """``detector`` was built by detectron2 alone, from the files ``config`` and ``weights``."""

    config: Path
    weights: Path
    detector: nn.Module

    def arguments(self, out: Path, *overrides: str) -> tuple[Any, ...]:
        """Of the command line."""
        return ("export", "--config", self.config, "--weights", self.weights, "--out", out, *overrides)


def write_config(family: str, folder: Path) -> Path:
    """A configuration that starts from the zoo's and makes it small."""
    if family in YAML:
        base, changes = YAML[family]
        path = folder / "config.yaml"
        path.write_text(f'_BASE_: "{get_config_file(base)}"\nMODEL:{changes}{_SIZE}')
        return path
    base, changes = LAZY[family]
    path = folder / "config.py"
    path.write_text(
        "from detectron2.layers import ShapeSpec\nfrom detectron2.model_zoo import get_config\n\n"
        f'zoo = get_config("{base}")\nmodel, dataloader = zoo.model, zoo.dataloader\ndel zoo\n{_LAZY_SIZE}{changes}'
    )
    return path


def stock_detector(config: Path) -> nn.Module:
    """Built as detectron2's own tools do."""
    if config.suffix == ".py":
        return instantiate(LazyConfig.load(str(config)).model).eval()
    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg).eval()


def own_model(family: str, folder: Path) -> OwnModel:
    """Configuration, checkpoint and detector of a family; the checkpoint is as detectron2's trainer leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = write_config(family, folder)
    torch.manual_seed(0)
    detector = stock_detector(config)
    calibrate(detector, canvases(128, 192, 3, seed=1))
    weights = folder / "model_final.pth"
    torch.save({"model": detector.state_dict(), "optimizer": {}, "iteration": 89999}, weights)
    return OwnModel(config, weights, detector)


def command_line(*arguments: object) -> int:
    """The exit code of the command line, in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["pipeline", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            main()
    return int(ending.value.code or 0)
