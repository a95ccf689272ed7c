"""Checkpoints in the layout of the LGD reference code become student checkpoints that compute the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from pipeline.errors import RecipeError
from pipeline.recipe_parts import CAFFE_BGR, resnet, retinanet, swin_tiny
from pipeline.recipe_parts.dense import atss, paper_fcos
from pipeline.recipe_parts.two_stage import faster_rcnn, mask_rcnn
from pipeline.reference import convert_reference_checkpoint
from training.backbones.weight_file import WeightsUnusable
from training.checkpoint import load_student, read_checkpoint
from training.reference_checkpoint import ReferenceStudent, student_from_reference
from training.student import build_student

TWO_STAGE = ("res2", "res3", "res4", "res5")
RESNET = resnet(18)
MODELS = {
    "RetinaNet": retinanet(RESNET, channels=16, num_head_convs=1, pixels=CAFFE_BGR),
    "RetinaNet Swin-T": retinanet(swin_tiny(), channels=16, num_head_convs=1, bottom_up_features=("p1", "p2", "p3")),
    "FCOS": paper_fcos(RESNET, channels=64, pixels=CAFFE_BGR),
    "ATSS": atss(RESNET, channels=64, pixels=CAFFE_BGR),
    "Faster R-CNN": faster_rcnn(resnet(18, out_features=TWO_STAGE), channels=16, box_head_channels=(32,)),
    "Mask R-CNN": mask_rcnn(resnet(18, out_features=TWO_STAGE), channels=16, box_head_channels=(32,)),
}


def trained(model: Any, num_classes: int = 5) -> nn.Module:
    """A student whose scores are high enough for detections."""
    student = build_student(model, num_classes, seed=3).eval()
    for name, parameter in student.named_parameters():
        if name.endswith("cls_score.bias"):
            nn.init.zeros_(parameter)
    return student


class ReferenceModule(nn.Module):
    """What the reference saves, made as the reference makes it: the network below the pyramid is taken out of it, and
    the pyramid is registered a second time."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = copy.deepcopy(student)
        self.student.fpn = self.student.backbone
        self.student.raw_backbone = self.student.fpn.bottom_up
        self.student.fpn.bottom_up = nn.Sequential()
        self.teacher = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mapper": nn.Conv2d(8, 8, 3)})
        self.adapter = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


def reference_state(student: nn.Module) -> dict[str, torch.Tensor]:
    """Its state dict, with what detectron2 of 2020 saved besides: pixel statistics and anchors."""
    module = ReferenceModule(student)
    kept = set(module.state_dict())
    derived = {f"student.{name}": buffer for name, buffer in student.named_buffers()}
    old = {k: v for k, v in derived.items() if k not in kept and ("pixel" in k or "cell_anchors" in k)}
    return dict(module.state_dict()) | old


def converted(tmp_path: Path, model: Any, content: Any) -> tuple[ReferenceStudent, Path]:
    torch.save(content, tmp_path / "lgd.pth")
    out = tmp_path / "student.pth"
    return student_from_reference(tmp_path / "lgd.pth", out, build=lambda n: build_student(model, n)), out


@pytest.mark.parametrize("family", MODELS)
def test_the_student_of_a_reference_checkpoint_detects_bit_for_bit_the_same(tmp_path: Path, family: str) -> None:
    original = trained(MODELS[family])
    state = reference_state(original)
    assert not any(".bottom_up." in key for key in state), "the reference keeps it apart"
    assert any(key.startswith("student.fpn.") for key in state)
    result, out = converted(tmp_path, MODELS[family], {"model": state, "iteration": np.int64(179_999), "optimizer": {}})
    assert result.num_classes == 5
    assert set(read_checkpoint(out)) == {"model"}
    loaded = load_student(build_student(MODELS[family], 5), out)
    images = [{"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)}]
    with torch.inference_mode():
        found, expected = loaded(images)[0]["instances"], original(images)[0]["instances"]
    assert len(found) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)
    if family == "Mask R-CNN":
        assert torch.equal(found.pred_masks, expected.pred_masks)


def test_the_parts_say_what_was_kept_and_dropped(tmp_path: Path) -> None:
    original = trained(MODELS["RetinaNet"])
    module = ReferenceModule(original)
    result, _ = converted(tmp_path, MODELS["RetinaNet"], {"model": reference_state(original)})
    kept = {group.part: group for group in result.kept}
    assert set(kept) == {"backbone.bottom_up", "pyramid", "head"}
    assert sum(group.num_tensors for group in result.kept) == len(original.state_dict())
    assert kept["head"].num_parameters == sum(p.numel() for p in original.head.parameters())
    dropped = {group.part: group for group in result.dropped}
    assert set(dropped) == {"teacher", "adapter", "second copy of the pyramid", "constants of the recipe"}
    assert dropped["teacher"].num_parameters == sum(p.numel() for p in module.teacher.parameters())
    assert dropped["second copy of the pyramid"].num_tensors == kept["pyramid"].num_tensors
    assert dropped["constants of the recipe"].num_tensors == 2 + 5  # mean, deviation, anchors of five levels


def test_another_detector_backbone_or_width_is_refused_with_what_differs(tmp_path: Path) -> None:
    content = {"model": reference_state(trained(MODELS["RetinaNet"]))}
    with pytest.raises(WeightsUnusable, match=r"no classifier of the recipe's detector \(GeneralizedRCNN\)"):
        converted(tmp_path, MODELS["Faster R-CNN"], content)
    deeper = retinanet(resnet(34), channels=16, num_head_convs=1, pixels=CAFFE_BGR)
    with pytest.raises(WeightsUnusable, match=r"80 tensors missing, 0 unexpected.*lacks backbone\.bottom_up\.res2\.2"):
        converted(tmp_path, deeper, content)
    wider = retinanet(RESNET, channels=32, num_head_convs=1, pixels=CAFFE_BGR)
    with pytest.raises(WeightsUnusable, match=r"fpn_lateral3\.weight has shape \(16, 128, 1, 1\), expected \(32, 128"):
        converted(tmp_path, wider, content)
    assert not (tmp_path / "student.pth").exists()


def test_a_recipe_with_other_pixels_or_anchors_is_refused(tmp_path: Path) -> None:
    content = {"model": reference_state(trained(MODELS["RetinaNet"]))}
    divided = retinanet(RESNET, channels=16, num_head_convs=1)
    with pytest.raises(WeightsUnusable, match=r"trained with pixel_mean \[103\.53, .*change the recipe's model\.pixel"):
        converted(tmp_path, divided, content)
    smaller = retinanet(RESNET, channels=16, num_head_convs=1, smallest_anchor_pixels=16, pixels=CAFFE_BGR)
    with pytest.raises(WeightsUnusable, match=r"trained with anchor_generator\.cell_anchors\.0"):
        converted(tmp_path, smaller, content)


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    model = MODELS["RetinaNet"]
    original = trained(model)
    state = reference_state(original)
    key = "student.fpn.fpn_lateral3.weight"
    with pytest.raises(WeightsUnusable, match=r"fpn_lateral3\.weight and its second copy differ"):
        converted(tmp_path, model, {"model": {**state, key: state[key] + 1}})
    with pytest.raises(
        WeightsUnusable, match=r"student\.raw_backbone\.\*, found .*goes into training\.init_checkpoint"
    ):
        converted(tmp_path, model, {"model": original.state_dict()})
    broken = {k: v.clone() for k, v in state.items()}
    broken["student.head.bbox_pred.bias"][0] = float("nan")
    with pytest.raises(WeightsUnusable, match=r"head\.bbox_pred\.bias holds NaN"):
        converted(tmp_path, model, {"model": broken})
    (tmp_path / "half.pth").write_bytes((tmp_path / "lgd.pth").read_bytes()[:5000])
    with pytest.raises(WeightsUnusable, match=r"half\.pth cannot be read as weights.*damaged"):
        student_from_reference(tmp_path / "half.pth", tmp_path / "x.pth", build=lambda n: build_student(model, n))


class Configuration:
    """Stands for a project's class that an old checkpoint holds."""


def test_a_checkpoint_that_holds_objects_names_them_and_how_to_get_its_tensors_out(tmp_path: Path) -> None:
    content = {"model": reference_state(trained(MODELS["RetinaNet"])), "cfg": Configuration()}
    with pytest.raises(
        WeightsUnusable, match=r"holds .*Configuration, and loading those would run code.*torch\.save\(\{'model'"
    ):
        converted(tmp_path, MODELS["RetinaNet"], content)


RECIPE = """
from detectron2.config import LazyCall as L

from export.config import ExportConfig
from export.parity import ParityConfig
from pipeline.recipe_parts import resnet, retinanet
from serving.config import BenchmarkConfig, ServingConfig
from training.config import TrainingConfig
from training.dataset import DatasetConfig
from training.distillers import LgdConfig

model = retinanet(resnet(50, deformable=True), channels=16, num_head_convs=1)
dataset = L(DatasetConfig)()
training = L(TrainingConfig)(max_iter=4, images_per_batch=2, learning_rate=0.01, short_edge_pixels=[64],
                             max_edge_pixels=96)
distiller = L(LgdConfig)()
export = L(ExportConfig)(canvas=[64, 96], short_edge_pixels=64, max_edge_pixels=96, max_batch_size=2)
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="tiny")
benchmark = L(BenchmarkConfig)()
"""


def test_the_command_reads_a_recipe_with_deformable_stages_and_prints_the_parts(tmp_path: Path) -> None:
    model = retinanet(resnet(50, deformable=True), channels=16, num_head_convs=1)
    torch.save({"model": reference_state(trained(model, num_classes=2))}, tmp_path / "lgd.pth")
    (tmp_path / "deformable.py").write_text(RECIPE)
    console = Console(record=True, width=200)
    arguments = (tmp_path / "lgd.pth", str(tmp_path / "deformable.py"), [])
    convert_reference_checkpoint(*arguments, out=tmp_path / "new" / "student.pth", console=console)
    printed = console.export_text()
    assert "backbone.bottom_up" in printed
    assert "teacher" in printed
    assert "2 classes" in printed
    load_student(build_student(model, 2), tmp_path / "new" / "student.pth")
    with pytest.raises(RecipeError, match="is the checkpoint itself"):
        convert_reference_checkpoint(*arguments, out=tmp_path / "lgd.pth", console=console)
