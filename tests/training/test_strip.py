from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_retinanet
from torch import nn

from training.checkpoint import CheckpointDamaged, load_student, read_checkpoint
from training.distillers import LgdConfig
from training.strip import StripProof, strip
from training.train import distilled_detector

LGD = LgdConfig(num_heads=4)


def module() -> nn.Module:
    student = build_tiny_retinanet(seed=5)
    # Scores around the threshold, so that the probe images have detections to compare.
    nn.init.constant_(student.head.cls_score.bias, -2.8)
    return distilled_detector(student, LGD)


def probes() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=generator)} for _ in range(2)]


def stripped(tmp_path: Path, content: dict[str, Any]) -> StripProof:
    torch.save(content, tmp_path / "model_final.pth")
    fresh = distilled_detector(build_tiny_retinanet(seed=9), LGD)
    return strip(
        tmp_path / "model_final.pth",
        tmp_path / "student.pth",
        student=fresh.student,
        distiller=fresh.distiller,
        probe_inputs=probes(),
    )


def test_the_student_checkpoint_is_the_student_and_nothing_else(tmp_path: Path) -> None:
    trained = module()
    content = {"model": trained.student.state_dict(), "distiller": trained.distiller.state_dict(), "iteration": 3}
    proof = stripped(tmp_path, content)
    assert proof.tensors_identical
    assert proof.keys_are_stock
    assert proof.num_teacher_tensors_in_student == 0
    assert proof.max_abs_difference == 0.0
    assert proof.kept.num_parameters == sum(v.numel() for v in trained.student.state_dict().values())
    assert sum(part.num_parameters for part in proof.removed) == sum(
        v.numel() for v in trained.distiller.state_dict().values()
    )
    assert set(read_checkpoint(tmp_path / "student.pth")) == {"model"}
    loaded = load_student(build_tiny_retinanet(seed=1), tmp_path / "student.pth")
    with torch.inference_mode():
        found, expected = loaded(probes())[0]["instances"], trained.student(probes())[0]["instances"]
    assert len(found) > 0, "the probe must have something to compare"
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_a_teacher_tensor_that_hides_under_a_students_key_is_found(tmp_path: Path) -> None:
    trained = module()
    model, distiller = trained.student.state_dict(), trained.distiller.state_dict()
    hidden = next(k for k, v in model.items() if v.shape == distiller["adapter.0.weight"].shape)
    model[hidden] = distiller["adapter.0.weight"].clone()
    assert stripped(tmp_path, {"model": model, "distiller": distiller}).num_teacher_tensors_in_student == 1


def test_a_teacher_key_in_the_students_entry_is_refused(tmp_path: Path) -> None:
    trained = module()
    model = {**trained.student.state_dict(), "adapter.0.weight": torch.zeros(1)}
    with pytest.raises(CheckpointDamaged, match=r"adapter\.0\.weight"):
        stripped(tmp_path, {"model": model, "distiller": trained.distiller.state_dict()})


def test_a_checkpoint_without_a_student_or_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointDamaged, match=r"model_final\.pth has no entry 'model'"):
        stripped(tmp_path, {"weights": {}})
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(CheckpointDamaged, match=r"broken\.pth cannot be read"):
        read_checkpoint(tmp_path / "broken.pth")


def test_a_student_of_another_shape_is_refused(tmp_path: Path) -> None:
    torch.save({"model": build_tiny_retinanet(num_classes=7).state_dict()}, tmp_path / "student.pth")
    with pytest.raises(CheckpointDamaged, match="does not fit the recipe's model"):
        load_student(build_tiny_retinanet(), tmp_path / "student.pth")
