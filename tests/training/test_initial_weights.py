"""Weights of every kind end up in the right tensors of a student, and those that do not fit are refused."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import Tensor, nn

from pipeline.recipe_parts import (
    CAFFE_BGR,
    IMAGENET_RGB,
    Pixels,
    resnet,
    resnext101_32x8d,
    retinanet,
    swin_tiny,
    timm_backbone,
)
from training.backbones.weight_file import WeightsUnusable
from training.initial_weights import check_initial_weights, load_initial_weights
from training.student import build_student
from training.weight_formats import read_weights


def student(bottom_up: Any, *, num_classes: int = 3, pixels: Pixels = IMAGENET_RGB, seed: int = 0) -> nn.Module:
    model = retinanet(copy.deepcopy(bottom_up), channels=16, num_head_convs=1, pixels=pixels)
    if "depths" in bottom_up:
        model.backbone.in_features = ["p1", "p2", "p3"]
        model.backbone.top_block = L(LastLevelP6P7)(in_channels=16, out_channels=16, in_feature="p5")
    return build_student(model, num_classes, seed=seed).eval()


@functools.cache
def torchvision_network(name: str) -> nn.Module:
    torch.manual_seed(7)
    network = getattr(torchvision.models, name)(weights=None).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # trained statistics differ from layer to layer
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return network


def saved(content: Any, path: Path) -> str:
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "bottom_up"),
    [
        ("resnet18", resnet(18)),
        ("resnet50", resnet(50, stride_in_1x1=False)),
        ("resnext101_32x8d", resnext101_32x8d()),
    ],
)
def test_torchvisions_weights_give_torchvisions_features(tmp_path: Path, name: str, bottom_up: Any) -> None:
    theirs = torchvision_network(name)
    ours = student(bottom_up)
    load_initial_weights(ours, saved(theirs.state_dict(), tmp_path / "weights.pth"))
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        expected = theirs.layer2(theirs.layer1(x))
        torch.testing.assert_close(ours.backbone.bottom_up(images)["res3"], expected, rtol=1e-3, atol=1e-4)
        deepest = theirs.layer4(theirs.layer3(expected))
        torch.testing.assert_close(ours.backbone.bottom_up(images)["res5"], deepest, rtol=1e-3, atol=1e-3)


def test_plain_weights_start_a_deformable_network_with_its_offsets_at_zero(tmp_path: Path) -> None:
    theirs = torchvision_network("resnet50")
    ours = student(resnet(50, deformable=True, stride_in_1x1=False))
    load_initial_weights(ours, saved(theirs.state_dict(), tmp_path / "weights.pth"))
    assert torch.equal(ours.backbone.bottom_up.res4[2].conv2.weight, theirs.layer3[2].conv2.weight)
    assert ours.backbone.bottom_up.res4[2].conv2_offset.weight.abs().max() == 0


def test_weights_trained_on_other_pixels_are_named_with_the_recipes_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = saved(torchvision_network("resnet50").state_dict(), tmp_path / "weights.pth")
    with caplog.at_level(logging.INFO):
        load_initial_weights(student(resnet(50, stride_in_1x1=False)), source)
    assert [r.levelno for r in caplog.records] == [logging.INFO, logging.INFO]
    assert "265 tensors loaded" in caplog.text  # 53 convolutions, each with 4 of its norm; no classifier, no counters
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_initial_weights(student(resnet(50), pixels=CAFFE_BGR), source)
    pixels, stride = (r.getMessage() for r in caplog.records)
    assert "kind torchvision, trained on RGB pixels" in pixels
    assert "model.input_format=BGR and model.pixel_std=[1.0, 1.0, 1.0]" in pixels
    assert "stride_in_1x1=False" in stride


def caffe2_names(backbone: nn.Module) -> dict[str, np.ndarray]:
    """A detectron2 ResNet's tensors as Caffe2 stores them: statistics folded in, so norms have scale and bias only."""
    named = {}
    for key, value in backbone.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            continue
        key = key.replace("stem.conv1.norm.", "res_conv1_bn_").replace("stem.", "")
        key = re.sub(r"\.conv(\d)\.", lambda m: f".branch2{'abc'[int(m[1]) - 1]}.", key)
        key = key.replace(".shortcut.", ".branch1.").replace(".norm.", ".bn.").replace(".", "_")
        key = re.sub(r"bn_weight$", "bn_s", re.sub(r"bn_bias$", "bn_b", key))
        named[re.sub(r"_weight$", "_w", key)] = value.numpy().copy()
    return named


def test_caffe2s_weights_load_from_a_pickle_with_norms_that_have_no_statistics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = student(resnet(50), seed=5)
    named = {**caffe2_names(trained.backbone.bottom_up), "fc1000_w": np.zeros((1000, 2048)), "fc1000_b": np.zeros(1000)}
    assert "res2_0_branch2a_bn_s" in named
    assert "conv1_w" in named
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": named, "__author__": "Caffe2", "matching_heuristics": True}))
    ours = student(resnet(50), pixels=CAFFE_BGR)
    with caplog.at_level(logging.WARNING):
        load_initial_weights(ours, str(path))
    assert not [r for r in caplog.records if r.name.startswith("training")]
    expected = trained.backbone.bottom_up.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.backbone.bottom_up.state_dict().items())
    with caplog.at_level(logging.WARNING):
        load_initial_weights(student(resnet(50), pixels=IMAGENET_RGB), str(path))
    assert "trained on BGR pixels not divided" in caplog.text
    with pytest.raises(WeightsUnusable, match=r"folded into scales: use norm='FrozenBN'"):
        check_initial_weights(student(resnet(50, norm="BN", freeze_at=0)), str(path))


def test_a_pickle_that_could_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": {"conv1_w": Path("/")}}))
    with pytest.raises(WeightsUnusable, match=r"weights\.pkl cannot be read as weights: it holds pathlib"):
        check_initial_weights(student(resnet(18)), str(path))


def test_detectron2s_own_backbone_pickle_loads_by_the_ends_of_its_names(tmp_path: Path) -> None:
    trained = student(resnet(18), seed=5).backbone.bottom_up
    content = {key: value.numpy() for key, value in trained.state_dict().items()}
    path = tmp_path / "R-18.pkl"
    path.write_bytes(pickle.dumps({"model": content, "__author__": "torchvision", "matching_heuristics": True}))
    ours = student(resnet(18))
    load_initial_weights(ours, str(path))
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in ours.backbone.bottom_up.state_dict().items())


def official_swin(seed: int) -> dict[str, Tensor]:
    """A state dict of the authors' classifier: their names are detectron2's, with a classifier and attention masks."""
    torch.manual_seed(seed)
    state = {k: v.clone() for k, v in student(swin_tiny(), seed=seed).backbone.bottom_up.state_dict().items()}
    state = {key: value for key, value in state.items() if not key.startswith("norm")}
    return state | {
        "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
        "norm.weight": torch.rand(768),
        "norm.bias": torch.rand(768),
        "head.weight": torch.rand(1000, 768),
        "head.bias": torch.rand(1000),
    }


def test_the_authors_swin_weights_load_without_their_classifier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    official = official_swin(seed=5)
    ours = student(swin_tiny())
    with caplog.at_level(logging.WARNING):
        load_initial_weights(ours, saved({"model": official}, tmp_path / "swin.pth"))
    assert not caplog.records
    found = ours.backbone.bottom_up.state_dict()
    assert all(torch.equal(value, official[key]) for key, value in found.items() if not key.startswith("norm"))
    assert torch.equal(found["norm3.weight"], torch.ones(768))


def test_a_timm_backbone_takes_timms_own_names(tmp_path: Path) -> None:
    torch.manual_seed(5)
    classifier = timm.create_model("convnext_atto", pretrained=False)
    ours = student(timm_backbone("convnext_atto", weights=None))
    load_initial_weights(ours, saved(classifier.state_dict(), tmp_path / "weights.pth"))
    body = ours.backbone.bottom_up.body
    assert torch.equal(body.stem_0.weight, classifier.stem[0].weight)
    assert torch.equal(body.stages_3.blocks[1].mlp.fc2.weight, classifier.stages[3].blocks[1].mlp.fc2.weight)


def test_a_whole_detector_of_the_same_classes_loads_completely(tmp_path: Path) -> None:
    trained = student(resnet(18), seed=5)
    ours = student(resnet(18))
    load_initial_weights(ours, saved({"model": trained.state_dict(), "iteration": 9}, tmp_path / "detector.pth"))
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in ours.state_dict().items())


def test_a_detector_of_other_classes_leaves_its_classifier_at_random_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = student(resnet(18), num_classes=80, seed=5)
    ours = student(resnet(18), num_classes=3)
    before = ours.head.cls_score.weight.clone()
    with caplog.at_level(logging.INFO):
        load_initial_weights(ours, saved({"model": trained.state_dict()}, tmp_path / "coco.pth"))
    assert torch.equal(ours.head.cls_score.weight, before)
    assert torch.equal(ours.head.bbox_pred.weight, trained.head.bbox_pred.weight)
    assert torch.equal(ours.backbone.fpn_lateral4.weight, trained.backbone.fpn_lateral4.weight)
    assert (
        "left at random initialisation, because the checkpoint has 80 classes and the data set 3: "
        "head.cls_score.weight, head.cls_score.bias" in caplog.text
    )


def test_a_detector_of_another_width_is_refused_and_the_student_unchanged(tmp_path: Path) -> None:
    trained = student(resnet(18), num_classes=80, seed=5).state_dict()
    trained["head.cls_score.weight"] = torch.zeros(720, 32, 3, 3)
    ours = student(resnet(18))
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(
        WeightsUnusable, match=r"head\.cls_score\.weight has shape \(720, 32, 3, 3\), expected \(27, 16, 3, 3\)"
    ):
        load_initial_weights(ours, saved({"model": trained}, tmp_path / "wide.pth"))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_checking_changes_nothing(tmp_path: Path) -> None:
    ours = student(resnet(18))
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    check_initial_weights(ours, saved(torchvision_network("resnet18").state_dict(), tmp_path / "weights.pth"))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_weights_of_another_network_are_refused_with_key_and_shapes(tmp_path: Path) -> None:
    resnet18 = saved(torchvision_network("resnet18").state_dict(), tmp_path / "resnet18.pth")
    resnet50 = saved(torchvision_network("resnet50").state_dict(), tmp_path / "resnet50.pth")
    with pytest.raises(
        WeightsUnusable, match=r"res2\.0\.conv1\.weight has shape \(64, 64, 1, 1\), expected \(64, 64, 3, 3\)"
    ):
        check_initial_weights(student(resnet(18)), resnet50)
    # 8 blocks of ResNet-34 are not in ResNet-18: 2 convolutions each, with 4 tensors of their norms.
    with pytest.raises(
        WeightsUnusable, match=r"lacks 80 of the backbone's tensors: backbone\.bottom_up\.res2\.2\.conv1"
    ):
        check_initial_weights(student(resnet(34)), resnet18)
    with pytest.raises(WeightsUnusable, match=r"none of its 1 tensors .* belongs to the student"):
        check_initial_weights(student(resnet(18)), saved({"elsewhere.weight": torch.zeros(2)}, tmp_path / "x.pth"))


def test_a_deeper_networks_weights_are_loaded_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deeper = student(resnet(34), seed=5).backbone.bottom_up.state_dict()
    shallow = student(resnet(18))
    with caplog.at_level(logging.WARNING):
        load_initial_weights(shallow, saved(deeper, tmp_path / "resnet34.pth"))
    assert "tensors have no place in the student: res2.2.conv1.weight" in caplog.text


def test_sources_that_cannot_be_read_name_themselves_and_the_way_out(tmp_path: Path) -> None:
    ours = student(resnet(18))
    with pytest.raises(WeightsUnusable, match=r"not found: /nowhere\.pth"):
        check_initial_weights(ours, "/nowhere.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(WeightsUnusable, match=r"broken\.pth cannot be read"):
        check_initial_weights(ours, str(tmp_path / "broken.pth"))
    with pytest.raises(WeightsUnusable, match=r"could not be fetched.*training\.init_checkpoint=/path/to/file"):
        check_initial_weights(ours, "catalog://ImageNetPretrained/no-such-model")
    reference = saved({"model": {"student.raw_backbone.stem.conv1.weight": torch.zeros(1)}}, tmp_path / "lgd.pth")
    with pytest.raises(WeightsUnusable, match="student-from-reference"):
        check_initial_weights(ours, reference)


def test_only_caffe2s_resnets_were_trained_on_undivided_pixels(tmp_path: Path) -> None:
    for inputs, undivided in ((64, True), (8, False)):
        path = tmp_path / f"{inputs}.pkl"
        path.write_bytes(pickle.dumps({"res2_0_branch2b_w": np.zeros((64, inputs, 3, 3), np.float32)}))
        weights = read_weights(path)
        assert (weights.channel_order, weights.unit_deviation) == ("BGR", undivided)
