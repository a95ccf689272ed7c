"""detectron2's backbones as recipes name them, and deformable stages whose checkpoints are detectron2's."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone import SwinTransformer
from detectron2.modeling.backbone import resnet as detectron2_resnet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from pipeline.recipe_parts import (
    CAFFE_BGR,
    IMAGENET_RGB,
    RESNEXT_BGR,
    resnet,
    resnext101_32x8d,
    retinanet,
    swin_tiny,
    timm_backbone,
)
from training.backbones.deformable import DeformableBottleneckBlock
from training.backbones.swin import Swin


def bilinear(plane: Tensor, y: float, x: float) -> float:
    """Value between cells, zero outside, as the deformable convolution papers define it."""
    total = 0.0
    for row, column in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
        if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
            total += float(plane[row, column]) * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def looped_deformable_convolution(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, stride: int, groups: int
) -> Tensor:
    """3x3 with padding 1; channel 2k of ``offset`` moves tap k down, channel 2k+1 to the right."""
    out_height, out_width = offset.shape[-2:]
    result = torch.zeros(len(x), len(weight), out_height, out_width)
    outputs_per_group, inputs_per_group = len(weight) // groups, weight.shape[1]
    for n, i, j, c in itertools.product(*(range(size) for size in (len(x), out_height, out_width, x.shape[1]))):
        taps = torch.tensor(
            [
                float(mask[n, k, i, j])
                * bilinear(
                    x[n, c],
                    i * stride - 1 + k // 3 + float(offset[n, 2 * k, i, j]),
                    j * stride - 1 + k % 3 + float(offset[n, 2 * k + 1, i, j]),
                )
                for k in range(9)
            ]
        )
        group = c // inputs_per_group
        outputs = slice(group * outputs_per_group, (group + 1) * outputs_per_group)
        result[n, outputs, i, j] += weight[outputs, c % inputs_per_group].flatten(1) @ taps
    return result


class LoopedModulatedDeformConv(nn.Module):
    """Stands in for the compiled operator that detectron2's own block calls, under its arguments."""

    def __init__(self, inputs: int, outputs: int, *, kernel_size: int, stride: int, padding: int, bias: bool,
                 groups: int, dilation: int, deformable_groups: int, norm: nn.Module) -> None:  # fmt: skip
        super().__init__()
        assert (kernel_size, padding, dilation, deformable_groups, bias) == (3, 1, 1, 1, False)
        self.stride, self.groups, self.norm, self.bias = stride, groups, norm, None
        self.weight = nn.Parameter(torch.zeros(outputs, inputs // groups, 3, 3))

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return self.norm(looped_deformable_convolution(x, offset, mask, self.weight, self.stride, self.groups))


def block(*, stride: int = 1, num_groups: int = 1, stride_in_1x1: bool = False) -> DeformableBottleneckBlock:
    torch.manual_seed(0)
    return DeformableBottleneckBlock(
        8, 12, bottleneck_channels=4, stride=stride, num_groups=num_groups, norm="FrozenBN", stride_in_1x1=stride_in_1x1
    )


@pytest.mark.parametrize(
    ("stride", "num_groups", "stride_in_1x1"), [(1, 1, False), (2, 1, False), (2, 1, True), (2, 2, False)]
)
def test_a_deformable_block_has_the_keys_and_outputs_of_detectron2s(
    monkeypatch: pytest.MonkeyPatch, stride: int, num_groups: int, stride_in_1x1: bool
) -> None:
    monkeypatch.setattr(detectron2_resnet, "ModulatedDeformConv", LoopedModulatedDeformConv)
    theirs = detectron2_resnet.DeformBottleneckBlock(
        8, 12, bottleneck_channels=4, stride=stride, num_groups=num_groups, norm="FrozenBN",
        stride_in_1x1=stride_in_1x1, deform_modulated=True,
    )  # fmt: skip
    ours = block(stride=stride, num_groups=num_groups, stride_in_1x1=stride_in_1x1)
    # Offsets up to a few cells, some of them outside the map, and masks other than one half.
    nn.init.normal_(ours.conv2_offset.weight, std=0.5)
    nn.init.normal_(ours.conv2_offset.bias, std=1.5)
    for norm in (m for m in ours.modules() if isinstance(m, FrozenBatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-5)


def test_a_deformable_convolution_starts_as_half_the_plain_one() -> None:
    ours = block(stride=2)
    seen: dict[str, Tensor] = {}
    ours.conv2.norm.register_forward_pre_hook(lambda module, inputs: seen.update(out=inputs[0]))
    ours.conv1.register_forward_hook(lambda module, inputs, output: seen.update(conv1=output))
    with torch.no_grad():
        ours(torch.randn(2, 8, 7, 6))
        plain = F.conv2d(seen["conv1"], ours.conv2.weight, stride=2, padding=1)
    torch.testing.assert_close(seen["out"], 0.5 * plain)


def test_offsets_and_weights_of_a_deformable_block_are_trained() -> None:
    ours = block()
    ours(torch.randn(1, 8, 6, 6)).square().sum().backward()
    for name in ("conv2_offset.weight", "conv2_offset.bias", "conv2.weight"):
        assert ours.get_parameter(name).grad.abs().max() > 0, name


def test_a_deformable_convolution_stays_in_float32_under_autocast() -> None:
    ours = block()
    nn.init.normal_(ours.conv2_offset.weight, std=2.0)
    seen: dict[str, Any] = {}
    ours.conv2.register_forward_pre_hook(lambda module, inputs: seen.update(dtypes={x.dtype for x in inputs}))
    ours.conv3.register_forward_pre_hook(lambda module, inputs: seen.update(after=inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        ours(torch.randn(1, 8, 6, 6))
    assert seen["dtypes"] == {torch.float32}
    assert seen["after"] == torch.bfloat16


def test_only_the_stages_after_the_first_are_deformable() -> None:
    network = instantiate(resnet(50, deformable=True))
    kinds = {name: {type(block) for block in getattr(network, name)} for name in network.stage_names}
    assert kinds["res2"] == {detectron2_resnet.BottleneckBlock}
    assert kinds["res3"] == kinds["res4"] == kinds["res5"] == {DeformableBottleneckBlock}


def yaml_resnet(depth: int, *, groups: int = 1, width: int = 64, stride_in_1x1: bool = True) -> nn.Module:
    """The network that detectron2's own configuration system builds."""
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec

    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NUM_GROUPS = groups
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = width
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = stride_in_1x1
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    return detectron2_resnet.build_resnet_backbone(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize(
    ("lazy", "theirs"),
    [
        (resnet(18), lambda: yaml_resnet(18)),
        (resnet(34), lambda: yaml_resnet(34)),
        (resnet(50), lambda: yaml_resnet(50)),
        (resnet(101), lambda: yaml_resnet(101)),
        (resnext101_32x8d(), lambda: yaml_resnet(101, groups=32, width=8, stride_in_1x1=False)),
    ],
    ids=["resnet18", "resnet34", "resnet50", "resnet101", "resnext101"],
)
def test_a_resnet_is_the_one_that_detectron2s_own_configuration_builds(lazy: Any, theirs: Any) -> None:
    ours, stock = instantiate(lazy).eval(), theirs().eval()
    stock.load_state_dict(ours.state_dict(), strict=True)
    frozen = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in stock.named_parameters() if not parameter.requires_grad}
    assert frozen
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        found, expected = ours(images), stock(images)
    assert {name: tuple(value.shape[-2:]) for name, value in found.items()} == {
        "res3": (8, 12), "res4": (4, 6), "res5": (2, 3),
    }  # fmt: skip
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_depths_that_do_not_exist_list_those_that_do() -> None:
    with pytest.raises(ValueError, match="resnet depth is 49, expected one of 18, 34, 50, 101"):
        resnet(49)
    with pytest.raises(ValueError, match="expected 50 or 101 with deformable"):
        resnet(18, deformable=True)


def test_swin_tiny_has_the_papers_size_and_the_strides_it_names() -> None:
    network = instantiate(swin_tiny(out_features=("p0", "p1", "p2", "p3")))
    # 27.5 million parameters without the classifier's, and a norm for each of four outputs instead of one.
    assert sum(p.numel() for p in network.parameters()) == 27_519_354 + 2 * (96 + 192 + 384)
    maps = network.train()(torch.zeros(1, 3, 64, 96))
    shapes = network.output_shape()
    assert {name: tuple(value.shape[1:]) for name, value in maps.items()} == {
        name: (shape.channels, 64 // shape.stride, 96 // shape.stride) for name, shape in shapes.items()
    }
    assert [shape.stride for shape in shapes.values()] == [4, 8, 16, 32]


def test_swin_drops_paths_in_training_only() -> None:
    network = instantiate(swin_tiny(drop_path_rate=0.5))
    images = torch.randn(2, 3, 64, 64)
    assert network.train() is network
    with torch.no_grad():
        assert not torch.equal(network(images)["p3"], network(images)["p3"])
        network.eval()
        assert torch.equal(network(images)["p3"], network(images)["p3"])


def small_swin(frozen_stages: int = -1) -> Swin:
    """Two stages, with attention biases that differ from cell to cell as trained ones do."""
    torch.manual_seed(0)
    network = Swin(embed_dim=12, depths=(2, 2), num_heads=(1, 2), out_indices=(0, 1), frozen_stages=frozen_stages)
    for name, parameter in network.named_parameters():
        if name.endswith(("bias_table", "bias")):
            nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize("size", [(96, 160), (56, 56), (20, 40), (70, 101)])
def test_swin_computes_what_detectron2s_own_computes(size: tuple[int, int]) -> None:
    ours = small_swin().eval()
    stock = SwinTransformer(embed_dim=12, depths=(2, 2), num_heads=(1, 2), out_indices=(0, 1)).eval()
    stock.load_state_dict(ours.state_dict(), strict=True)
    assert list(stock.state_dict()) == list(ours.state_dict())
    images = torch.randn(2, 3, *size)
    for network in (ours, stock):
        sum(value.square().sum() for value in network(images).values()).backward()
    with torch.no_grad():
        found, expected = ours(images), stock(images)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    for (name, parameter), theirs in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_frozen_stages_of_swin_neither_train_nor_drop_paths() -> None:
    network = small_swin(frozen_stages=2).train()
    assert network.training
    assert not network.patch_embed.training
    assert not any(module.training for module in network.layers[0].modules())
    assert all(module.training for module in network.layers[1].modules())
    frozen = {
        name.split(".")[0] + "." + name.split(".")[1] for name, p in network.named_parameters() if not p.requires_grad
    }
    assert frozen == {"patch_embed.proj", "patch_embed.norm", "layers.0"}


TRAINED = {
    "resnet18": (resnet(18), IMAGENET_RGB),
    "resnet50 deformable": (resnet(50, deformable=True), CAFFE_BGR),
    "resnext101": (resnext101_32x8d(), RESNEXT_BGR),
    "resnext101 deformable": (resnext101_32x8d(deformable=True), RESNEXT_BGR),
    "swin": (swin_tiny(), IMAGENET_RGB),
    "timm": (timm_backbone("convnext_atto", weights=None), IMAGENET_RGB),
}


@pytest.mark.parametrize("name", TRAINED)
def test_every_backbone_trains_two_iterations_inside_a_retinanet(name: str) -> None:
    torch.manual_seed(0)
    lazy, pixels = TRAINED[name]
    features = ("p1", "p2", "p3") if name == "swin" else ("res3", "res4", "res5")
    model = retinanet(lazy, channels=16, num_head_convs=1, pixels=pixels)
    model.backbone.in_features = list(features)
    model.backbone.top_block = L(LastLevelP6P7)(in_channels=16, out_channels=16, in_feature="p5")
    model.num_classes = 3
    student = instantiate(model).train()
    instances = Instances(
        (64, 96), gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 56.0, 40.0]])), gt_classes=torch.tensor([1])
    )
    batch = [{"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8), "instances": instances}]
    trained = {key: p for key, p in student.backbone.bottom_up.named_parameters() if p.requires_grad}
    before = {key: p.detach().clone() for key, p in trained.items()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)  # any gradient at all moves a parameter
    for _ in range(2):
        with EventStorage():
            loss = sum(student(batch).values())
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(student.parameters(), 1.0)
        optimizer.step()
    changed = [key for key, p in trained.items() if not torch.equal(p, before[key])]
    # Swin's last stages see windows of one to six cells, where some attention biases get no gradient.
    assert len(changed) > 0.9 * len(trained)
