from __future__ import annotations

import pytest
import torch

from training.detectors.location_head import GflHead, LocationHead


def test_the_head_has_the_layers_and_names_of_the_reference_code() -> None:
    head = LocationHead(channels=256, num_classes=80)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    towers = [f"{tower}.{3 * i + j}.{kind}" for tower in ("cls_subnet", "bbox_subnet") for i in range(4)
              for j in (0, 1) for kind in ("weight", "bias")]  # fmt: skip
    outputs = [f"{name}.{kind}" for name in ("cls_score", "bbox_pred", "centerness") for kind in ("weight", "bias")]
    assert set(shapes) == {*towers, *outputs, *(f"scales.{i}.scale" for i in range(5))}
    assert shapes["cls_score.weight"] == (80, 256, 3, 3)
    assert shapes["bbox_subnet.9.weight"] == (256, 256, 3, 3)
    assert shapes["scales.4.scale"] == (1,)
    assert head.cls_subnet[1].num_groups == 32
    assert head.cls_score.bias[0].sigmoid().item() == pytest.approx(0.01)
    assert head.cls_subnet[0].weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_the_head_of_gfl_is_that_head_without_centerness_and_with_a_distribution_an_edge() -> None:
    shapes, expected = (
        {name: tuple(value.shape) for name, value in head.state_dict().items()}
        for head in (GflHead(channels=256, num_classes=80), LocationHead(channels=256, num_classes=80, reg_max=16))
    )
    del expected["centerness.weight"], expected["centerness.bias"]
    assert shapes == expected
    assert shapes["bbox_pred.weight"] == (4 * 17, 256, 3, 3)
    head = GflHead(channels=32, num_classes=5, num_convs=1, norm_groups=8, num_levels=2, reg_max=3)
    assert head.cls_score.bias[0].sigmoid().item() == pytest.approx(0.01)
    assert head.bbox_pred.weight.std().item() == pytest.approx(0.01, rel=0.05)
    feature = torch.randn(1, 32, 4, 4)
    with torch.no_grad():
        head.scales[1].scale.fill_(3.0)
        logits, values = head([feature, feature])
    assert (logits[0].shape, values[0].shape) == ((1, 5, 4, 4), (1, 16, 4, 4))
    assert torch.equal(logits[1], logits[0])
    assert torch.equal(values[1], values[0] * 3)
    assert values[0].min() < 0, "raw logits, which localisation distillation compares"


@pytest.mark.parametrize("head", [GflHead, LocationHead])
@pytest.mark.parametrize("reg_max", [0, -1, 2.5, True, "16"])
def test_a_reg_max_that_leaves_no_distance_is_refused(head: type, reg_max: object) -> None:
    with pytest.raises(ValueError, match=rf"reg_max is {reg_max!r}, expected a whole number of 1 or more"):
        head(channels=32, num_classes=2, norm_groups=8, reg_max=reg_max)


def test_centerness_comes_from_the_box_tower_and_each_level_has_its_scale() -> None:
    head = LocationHead(channels=32, num_classes=5, num_convs=1, norm_groups=8, num_levels=2)
    feature = torch.randn(1, 32, 4, 4)
    with torch.no_grad():
        head.scales[1].scale.fill_(3.0)
        logits, values, centerness = head([feature, feature])
        for parameter in head.cls_subnet.parameters():
            parameter.zero_()
        again = head([feature, feature])
    assert torch.equal(values[1], values[0] * 3)
    distances = head.edges.distances(values[0].flatten(2).mT)
    assert distances.min() == 0 < distances.max()
    assert torch.equal(again[2][0], centerness[0])
    assert not torch.equal(again[0][0], logits[0])


@pytest.mark.parametrize("head", [GflHead, LocationHead])
def test_groups_that_do_not_divide_the_channels_are_refused(head: type) -> None:
    with pytest.raises(ValueError, match=r"norm_groups is 32, which does not divide its 48 channels"):
        head(channels=48, num_classes=2)
    with pytest.raises(ValueError, match=r"norm_groups is 0, which does not divide its 48 channels"):
        head(channels=48, num_classes=2, norm_groups=0)


def test_groups_of_one_channel_which_a_level_of_one_cell_cannot_normalise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norm_groups is 32 for 32 channels, one channel a group; .*smaller"):
        LocationHead(channels=32, num_classes=2)
    head = LocationHead(channels=32, num_classes=2, num_levels=1, norm_groups=16)
    assert all(torch.isfinite(values).all() for level in head.train()([torch.randn(1, 32, 1, 1)]) for values in level)
