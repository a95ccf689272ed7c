"""A whole detector's checkpoint from elsewhere: it is read in every form that detectron2 writes, and fits exactly."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import build_tiny_retinanet
from torch import Tensor

from training.backbones.weight_file import WeightsUnusable
from training.imported_checkpoint import imported_state

STATE = build_tiny_retinanet().state_dict()


def saved(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".pkl":  # as detectron2's model zoo has them
        arrays = {key: value.numpy() for key, value in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"model": state, "optimizer": {"param_groups": [{"lr": 0.1}]}, "iteration": 89999}, path)
    return path


@pytest.mark.parametrize("name", ["model_final.pth", "model_final_bfca0b.pkl", "model.safetensors"])
def test_every_kind_of_file_gives_the_same_tensors(name: str, tmp_path: Path) -> None:
    detector = build_tiny_retinanet(seed=1)
    found = imported_state(detector, saved(STATE, tmp_path / name))
    assert list(found) == list(STATE)
    assert all(torch.equal(found[key], value) for key, value in STATE.items())
    detector.load_state_dict(found, strict=True)


def test_half_precision_and_parallel_trainings_are_read(tmp_path: Path) -> None:
    halves = {f"module.{key}": value.half() if value.is_floating_point() else value for key, value in STATE.items()}
    found = imported_state(build_tiny_retinanet(seed=1), saved(halves, tmp_path / "model.pth"))
    assert {value.dtype for value in found.values()} == {value.dtype for value in STATE.values()}
    assert all(torch.equal(found[key], value.half().to(value.dtype)) for key, value in STATE.items())


def test_what_detectron2_derives_may_be_there_with_the_same_values(tmp_path: Path) -> None:
    detector = build_tiny_retinanet()
    derived = {key: value for key, value in detector.named_buffers() if key not in STATE}
    assert {"pixel_mean", "pixel_std", "anchor_generator.cell_anchors.0"} <= set(derived)
    old = {**STATE, **derived, "pixel_mean": derived["pixel_mean"].flatten()}
    assert list(imported_state(detector, saved(old, tmp_path / "old.pth"))) == list(STATE)
    anchors = {**STATE, "anchor_generator.cell_anchors.0": derived["anchor_generator.cell_anchors.0"] + 4}
    with pytest.raises(WeightsUnusable, match=r"was trained with anchor_generator\.cell_anchors\.0 \["):
        imported_state(detector, saved(anchors, tmp_path / "anchors.pth"))


def test_a_backbone_alone_is_not_a_detector(tmp_path: Path) -> None:
    backbone = {key: value for key, value in STATE.items() if key.startswith("backbone.bottom_up.")}
    with pytest.raises(WeightsUnusable, match=r"tensors are missing: backbone\.fpn_.* and \d+ more\. Give the config"):
        imported_state(build_tiny_retinanet(), saved(backbone, tmp_path / "backbone.pth"))


def test_a_pickle_that_holds_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": {"head.cls_score.bias": Path("/")}}))
    with pytest.raises(WeightsUnusable, match=r"it holds pathlib\.\w+, which is not an array"):
        imported_state(build_tiny_retinanet(), path)
