"""What `export` of one's own model refuses, by name, with exit code 2 and before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import RecipeError
from pipeline.own_model import prepared
from pipeline.recipe import FOLDER_RECIPE
from tests.own_models import OwnModel, command_line, own_model, write_config


@pytest.fixture(scope="module")
def retinanet(tmp_path_factory: pytest.TempPathFactory) -> OwnModel:
    return own_model("RetinaNet", tmp_path_factory.mktemp("retinanet"))


UNSUPPORTED = {
    "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml": "RPN with Res5ROIHeads",
    "COCO-Detection/rpn_R_50_FPN_1x.yaml": "ProposalNetwork",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml": "keypoint head",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml": "PanopticFPN has an inference of its own",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml": "CascadeROIHeads",
    "Misc/semantic_R_50_FPN_1x.yaml": "SemanticSegmentor",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_has_no_graph_is_named_with_what_is_supported(
    name: str, retinanet: OwnModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("export", "--config", name, "--weights", retinanet.weights, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert UNSUPPORTED[name] in error
    assert "supported families: DistributionRetinaNet, FCOS, GeneralizedRCNN, GflDetector, LocationDetector" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("COCO-Detection/retinanet_R_50_FPN_2x.yaml", r"did you mean 'COCO-Detection/retinanet_R_50_FPN_[13]x"),
        ("nothing.yaml", r"neither a file nor a name in detectron2's model zoo"),
        ("Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml", r"cannot be built: ImportError: .*DeformConv"),
        ("MODEL: {MY_OWN_KEY: 3}", r"config\.yaml: KeyError: .*MY_OWN_KEY.* keys of its own .* LazyConfig"),
        ("MODEL: [", r"config\.yaml: \w+Error"),
        ("model = 3 +", r"config\.py, line 1: SyntaxError"),
        ("optimizer = dict(lr=1)", r"config\.py has no `model`; it has optimizer"),
        ("def net(): pass\nmodel = dict(_target_=net, num_classes=3)", r"made by net, which the file defines itself"),
        ("model = dict(backbone=dict())", r"neither model nor model\.roi_heads has num_classes"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(
    config: str, message: str, retinanet: OwnModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not config.endswith(".yaml"):
        path = tmp_path / ("config.yaml" if config.startswith("MODEL") else "config.py")
        path.write_text(config)
        config = str(path)
    assert command_line("export", "--config", config, "--weights", retinanet.weights, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def without_size(tmp_path: Path) -> Path:
    path = write_config("RetinaNet", tmp_path)
    path.write_text(path.read_text().replace("MIN_SIZE_TEST: 96", "MIN_SIZE_TEST: 0"))
    return path


def test_a_configuration_without_a_test_size_needs_a_canvas(retinanet: OwnModel, tmp_path: Path) -> None:
    config = str(without_size(tmp_path))
    with pytest.raises(RecipeError, match=r"does not say .* how large test images are; give export\.canvas"):
        prepared(config, retinanet.weights, [], tmp_path / FOLDER_RECIPE)
    given = prepared(config, retinanet.weights, ["export.canvas=[64,96]"], tmp_path / FOLDER_RECIPE)[0]
    assert (given.sections["export"].short_edge_pixels, given.sections["export"].max_edge_pixels) == (64, 96)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("export.canvas=[100,128]", r"100 x 128 is not divisible by 32.*nearest that is: 128 x 128"),
        ("export.canvas=[64]", r"export\.canvas: found \[64\]"),
        ("export.max_batch_size=0", r"export\.max_batch_size is 0, expected at least 1"),
        ("export.max_batch_size=many", r"export\.max_batch_size: found 'many'"),
        ("export.short_edge_pixels=500", r"expected 1 <= short edge <= max edge"),
        ("model.num_classes=5", r"head\.cls_score\.\w+ \(.* It has 3 classes and the configuration 5\."),
        ("training.class_names=[a,b]", r"training\.class_names has 2 entries, expected 3"),
        ("training.checkpiont=x", r"did you mean 'checkpoint'"),
    ],
)
def test_sizes_batches_and_classes_that_cannot_be_are_refused(
    override: str, message: str, retinanet: OwnModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(*retinanet.arguments(tmp_path / "run", override)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("head.")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_head, r"\d of the detector's \d+ tensors are missing: head\.\S+, head\.\S+, head\.\S+ and 5 more"),
        (lambda s: {**s, "mask.weight": torch.zeros(2)}, r"1 have no place in it: mask\.weight"),
        (
            lambda s: {**s, "head.bbox_pred.bias": torch.zeros(12)},
            r"1 have another shape: head\.bbox_pred\.bias \(12,\), expected \(36,\)",
        ),
        (lambda s: {**s, "head.bbox_pred.bias": torch.full((36,), torch.nan)}, r"1 tensors are not finite: head\.bbox"),
        (lambda s: {f"student.{key}": value for key, value in s.items()}, r"none of its .*student-from-reference"),
        (lambda s: {**s, "pixel_mean": torch.tensor([123.7, 116.3, 103.5])}, r"trained with pixel_mean \[123\.7"),
    ],
)
def test_weights_that_do_not_fit_are_named_before_anything_is_written(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
    retinanet: OwnModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = tmp_path / "model.pth"
    torch.save({"model": change(dict(retinanet.detector.state_dict()))}, weights)
    assert command_line(*OwnModel(retinanet.config, weights, retinanet.detector).arguments(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_weights_that_are_missing_or_cut_off_are_named(
    retinanet: OwnModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.pth"
    cut.write_bytes(retinanet.weights.read_bytes()[:1000])
    for weights, message in ((cut, "cannot be read as weights"), (tmp_path / "none.pth", "there is no such file")):
        assert command_line(*OwnModel(retinanet.config, weights, retinanet.detector).arguments(tmp_path / "run")) == 2
        error = capsys.readouterr().err
        assert message in error
        assert weights.name in error


def test_a_folder_with_other_files_is_left_alone(
    retinanet: OwnModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train").mkdir()
    assert command_line(*retinanet.arguments(tmp_path)) == 2
    assert "a folder with other files in it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
