"""Training with LGD, for every dense family, on images so small that the coarsest levels are one cell."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from dense_detectors import DENSE

from tests.training.training_runs import coco_of_equal_images, config, final, run
from training.tracking import METRICS_FILE


@pytest.mark.parametrize("family", DENSE)
def test_two_steps_with_lgd_are_finite_and_leave_the_stock_student(family: str, tmp_path: Path) -> None:
    dataset = coco_of_equal_images(tmp_path / "data", num_images=4, size=(64, 96))
    student = DENSE[family](len(dataset.class_names))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    settings = config(3, short_edge_pixels=(64,), max_edge_pixels=96)
    run(tmp_path, dataset, settings, student=student)
    metrics = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    losses = {name for name in metrics[-1] if name.startswith("loss")}
    assert {f"{name}.tea" for name in losses if "." not in name and name != "loss_distill"} < losses
    assert all(math.isfinite(row[name]) for row in metrics for name in losses)
    trained = final(tmp_path)["model"]
    DENSE[family](len(dataset.class_names)).load_state_dict(trained, strict=True)
    for part in ("head.cls_score", "head.bbox_pred", "head.cls_subnet", "backbone.fpn_lateral3", "backbone.bottom_up"):
        assert any(not torch.equal(trained[name], before[name]) for name in trained if name.startswith(part)), part
