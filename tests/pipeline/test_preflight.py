"""Bad input is refused in the first seconds of a run, by a message that says what to do."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.modeling import GeneralizedRCNN, SemanticSegmentor

from export import precision as conversion
from export.config import ExportConfig
from export.detector_graph import UnsupportedDetector
from export.precision import ModelOptMissing, TooFewCalibrationImages
from export.targets.tensorrt_target import UnsupportedEngine
from pipeline import recipe as recipes
from pipeline.errors import RecipeError, Unavailable
from pipeline.preflight import NUM_CLASSES, check_conversion, preflight
from pipeline.recipe import Recipe
from pipeline.recipe_parts import atss, gfl, paper_fcos, resnet, retinanet
from training.backbones.timm_backbone import UnsupportedBackbone
from training.backbones.weight_file import WeightsUnusable
from training.dataset_config import DatasetConfig
from training.detection_losses import UnsupportedStudent
from training.distillers.lgd.objects import LgdInputError
from training.evaluate import DeviceUnavailable
from training.launch import LaunchError
from training.student import build_student
from training.tracking import TrackerMissing
from training.train import StudentUnsuited, distilled_detector

STAND_IN = Path(__file__).parents[1] / "stand_in"
TINY = Path(__file__).with_name("tiny_recipe.py")


def launched(command: str, *overrides: str) -> Recipe:
    return dataclasses.replace(recipes.load(TINY, overrides), launch=command)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["training.max_iter=1"], RecipeError, r"distiller\.distill_from_iter is 1 and training\.max_iter is 1"),
        (["distiller=lgd"], RecipeError, r"distiller\.distill_from_iter is 30000"),
        (["distiller.distill_until_iter=1"], RecipeError, r"distill_until_iter is 1 .* nothing would be distilled"),
        (["distiller.num_heads=5"], LgdInputError, r"does not divide the 32 channels"),
        (["export.canvas=[100,128]"], UnsupportedDetector, r"nearest that is: 128 x 128"),
        (["export.canvases=[[96,96],[64,100]]"], UnsupportedDetector, r"canvas 64 x 100 .* nearest that is: 64 x 128"),
        (["export.canvas=[64,64]"], UnsupportedDetector, r"do not fit a canvas of 64 x 64"),
        (
            ["export.nms=outside", "serving.server=path", "serving.backend=onnxruntime"],
            RecipeError,
            r"serving\.backend=onnxruntime runs the model alone; set serving\.backend=python",
        ),
        (
            ["export.min_batch_size=2", "serving.server=path", "serving.backend=tensorrt"],
            RecipeError,
            r"export\.min_batch_size=2 .*set serving\.backend=python_tensorrt",
        ),
        (["export.opt_batch_size=5"], RecipeError, r"export\.opt_batch_size 5 and export\.max_batch_size 4, expected"),
        (["model.backbone.bottom_up.name=mobilenet_v2"], UnsupportedBackbone, r"mobilenetv2_"),
        (["model.head_in_features=[p2,p3]"], StudentUnsuited, r"backbone has no p2, only p3, p4, p5, p6, p7"),
        (["distiller.use_masks=true"], StudentUnsuited, r"use_masks is true and the student has no mask head"),
        (["training.accumulate_batches=2", "training.images_per_batch=3"], RecipeError, r"multiple of"),
        (["training.init_checkpoint=/nowhere/a.pth"], WeightsUnusable, r"/nowhere/a\.pth"),
    ],
)
def test_what_would_fail_after_the_training_fails_before_it(
    overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        preflight(recipes.load(TINY, overrides))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["precision=int8"], TooFewCalibrationImages, r"512 training images and the training set has 12"),
        (["precision=fp8", "compute_capabilities=['75','86']"], UnsupportedEngine, r"75 has no fp8.*86 has no fp8"),
        (["precision=bf16", "compute_capabilities=['75']"], UnsupportedEngine, r"75 has no bf16, which begins with 80"),
        (["precision=bf16"], Unavailable, r"bf16 is to be served on a CPU, .* no bfloat16 kernels.*--until validate"),
        (["precision=fp8", "num_calibration_images=12"], Unavailable, r"fp8 is to be served on a CPU"),
    ],
)
def test_a_precision_that_cannot_be_made_built_or_served_is_refused_before_the_training(
    overrides: list[str], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "MODELOPT", STAND_IN)
    values = [f"export.{override}" for override in overrides]
    recipe = recipes.load(TINY, [*values, "serving.device=cpu"])
    with pytest.raises(error, match=message):
        preflight(recipe)


def test_a_precision_that_only_a_gpu_serves_can_be_made_without_serving_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "MODELOPT", STAND_IN)
    preflight(recipes.load(TINY, ["export.precision=bf16", "serving.device=cpu"]), serves=False)
    preflight(recipes.load(TINY, ["export.precision=int8", "export.num_calibration_images=12"]))


def test_a_model_that_was_trained_elsewhere_needs_a_training_set_for_a_precision_that_is_calibrated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversion, "MODELOPT", STAND_IN)
    for dataset in (DatasetConfig(), DatasetConfig(validation="validation.json")):
        with pytest.raises(RecipeError, match=r"export\.precision=int8 is calibrated on .*dataset\.train=FILE"):
            check_conversion(ExportConfig(precision="int8"), dataset, imported=True)
        check_conversion(ExportConfig(), dataset, imported=True)


def test_modelopt_is_missed_before_the_training_and_only_by_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "MODELOPT", tmp_path)
    with pytest.raises(ModelOptMissing, match="make setup-precision"):
        preflight(recipes.load(TINY, ["export.precision=fp16"]))
    preflight(recipes.load(TINY, ["export.precision=tf32"]))


def test_an_unknown_precision_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(RecipeError, match=r"export\.precision: found 'fp17' .*'fp32', 'tf32', 'fp16', .*'fp8'"):
        recipes.load(TINY, ["export.precision=fp17"])


def test_a_recipe_whose_parts_fit_passes() -> None:
    preflight(recipes.load(TINY))
    preflight(recipes.load(TINY, ["distiller=none"]))
    preflight(launched("torchrun --nproc-per-node=2", "training.device=cpu"))


def test_an_unknown_distiller_lists_those_that_there_are() -> None:
    with pytest.raises(RecipeError, match=r"unknown distiller 'lgdd', did you mean 'lgd'\? There are lgd, none"):
        recipes.load(TINY, ["distiller=lgdd"])


def test_a_detector_without_known_losses_is_refused() -> None:
    student = SemanticSegmentor(
        backbone=build_student(recipes.load(TINY).model, NUM_CLASSES).backbone,
        sem_seg_head=torch.nn.Identity(), pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3,
    )  # fmt: skip
    with pytest.raises(UnsupportedStudent, match=r"no pyramid known for SemanticSegmentor; supported: .*DenseDetector"):
        distilled_detector(student, recipes.load(TINY).sections["distiller"])


def test_a_pyramid_whose_levels_differ_in_channels_is_refused() -> None:
    recipe = recipes.load(TINY)
    student = build_student(recipe.model, NUM_CLASSES)
    student.backbone = student.backbone.bottom_up
    student.head_in_features = ["res3", "res4", "res5"]
    with pytest.raises(StudentUnsuited, match=r"differ in channels: res3 has \d+, res4 has \d+, .*put an FPN between"):
        distilled_detector(student, recipe.sections["distiller"])


def test_a_model_that_cannot_be_built_is_told_with_the_recipe(tmp_path: Path) -> None:
    recipe = recipes.load(TINY)
    broken = dataclasses.replace(recipe, model=L(GeneralizedRCNN)(backbone={}, roi_heads={"num_classes": 80}))
    with pytest.raises(RecipeError, match=r"tiny_recipe\.py: its model cannot be built: TypeError: .*missing"):
        preflight(broken)


@pytest.mark.parametrize("part", [paper_fcos, atss, gfl])
def test_a_head_whose_norm_has_one_channel_a_group_is_refused(part: Callable[..., Any]) -> None:
    recipe = dataclasses.replace(recipes.load(TINY), model=part(resnet(18), channels=32))
    with pytest.raises(RecipeError, match=r"tiny_recipe\.py: .*norm_groups is 32 for 32 channels.*choose a smaller"):
        preflight(recipe)


@pytest.mark.parametrize("part", [retinanet, paper_fcos, atss, gfl])
def test_distributions_of_too_small_a_reg_max_are_refused(part: Callable[..., Any]) -> None:
    recipe = dataclasses.replace(recipes.load(TINY), model=part(resnet(18), channels=64, reg_max=0))
    with pytest.raises(RecipeError, match=r"tiny_recipe\.py: .*reg_max is 0, expected a whole number of 1 or more"):
        preflight(recipe)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    state = build_student(recipes.load(TINY).model, NUM_CLASSES).state_dict()
    key = "backbone.fpn_output3.weight"
    torch.save({"model": {**state, key: state[key][:16]}}, tmp_path / "narrow.pth")
    with pytest.raises(WeightsUnusable, match=r"fpn_output3\.weight has shape \(16, .*expected \(32, "):
        preflight(recipes.load(TINY, [f"training.init_checkpoint={tmp_path / 'narrow.pth'}"]))
    torch.save({"model": state}, tmp_path / "fits.pth")
    preflight(recipes.load(TINY, [f"training.init_checkpoint={tmp_path / 'fits.pth'}"]))


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("torchrun --nproc-per-node=3", [], r"images_per_batch is 2, .*3 processes"),
        ("torchrun --nproc-per-node=2", ["training.accumulate_batches=2"], r"2 processes x 2 parts"),
        ("python train.py", [], r"does not call torchrun"),
    ],
)
def test_a_launch_that_does_not_fit_the_batch_is_refused(command: str, overrides: list[str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        preflight(launched(command, "training.device=cpu", *overrides))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LaunchError, match=r"starts 2 processes and this machine has 1 GPU;"):
        preflight(launched("torchrun --nproc-per-node=2"))


def test_what_this_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceUnavailable, match=r"training\.precision=fp16 needs a GPU"):
        preflight(recipes.load(TINY, ["training.precision=fp16", "training.device=cpu"]))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(TrackerMissing, match=r"mlflow_experiment=e, but the package mlflow cannot be imported"):
        preflight(recipes.load(TINY, ["training.mlflow_experiment=e"]))
