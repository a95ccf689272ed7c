from __future__ import annotations

import pytest
import torch

from training.detectors.location_head import LocationHead


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


def test_centerness_comes_from_the_box_tower_and_each_level_has_its_scale() -> None:
    head = LocationHead(channels=32, num_classes=5, num_convs=1, norm_groups=8, num_levels=2)
    feature = torch.randn(1, 32, 4, 4)
    with torch.no_grad():
        head.scales[1].scale.fill_(3.0)
        logits, distances, centerness = head([feature, feature])
        for parameter in head.cls_subnet.parameters():
            parameter.zero_()
        again = head([feature, feature])
    assert torch.equal(distances[1], distances[0] * 3)
    assert distances[0].min() == 0 < distances[0].max()
    assert torch.equal(again[2][0], centerness[0])
    assert not torch.equal(again[0][0], logits[0])


def test_groups_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norm_groups is 32, which does not divide its 48 channels"):
        LocationHead(channels=48, num_classes=2)
    with pytest.raises(ValueError, match=r"norm_groups is 0, which does not divide its 48 channels"):
        LocationHead(channels=48, num_classes=2, norm_groups=0)


def test_groups_of_one_channel_which_a_level_of_one_cell_cannot_normalise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norm_groups is 32 for 32 channels, one channel a group; .*smaller"):
        LocationHead(channels=32, num_classes=2)
    head = LocationHead(channels=32, num_classes=2, num_levels=1, norm_groups=16)
    assert all(torch.isfinite(values).all() for level in head.train()([torch.randn(1, 32, 1, 1)]) for values in level)
