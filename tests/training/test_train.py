from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_retinanet

from tests.training.training_runs import config, run
from training.backbones.weight_file import WeightsUnusable
from training.checkpoint import FINAL_CHECKPOINT, read_checkpoint
from training.dataset import CocoDataset, read_coco
from training.distillers import NoDistillerConfig
from training.divergence import LossNotFinite
from training.embedded_dataset import generate
from training.evaluate import DeviceUnavailable
from training.tracking import METRICS_FILE


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    train_file, _ = generate(tmp_path_factory.mktemp("data"), num_train=6, num_validation=1)
    return read_coco(train_file)


def test_the_checkpoint_holds_the_student_under_its_stock_keys_and_the_distiller_apart(
    tmp_path: Path, dataset: CocoDataset
) -> None:
    result = run(tmp_path, dataset, config())
    checkpoint = read_checkpoint(tmp_path / FINAL_CHECKPOINT)
    stock = build_tiny_retinanet(num_classes=len(dataset.class_names))
    assert set(checkpoint["model"]) == set(stock.state_dict())
    assert set(checkpoint) >= {"model", "distiller", "trainer", "iteration"}
    assert result.num_parameters["student"] == sum(p.numel() for p in stock.parameters())
    moved = {k for k, v in checkpoint["model"].items() if not torch.equal(v, stock.state_dict()[k])}
    assert any(key.startswith("head.") for key in moved)


def test_a_call_on_a_directory_with_checkpoints_goes_on_from_the_last(tmp_path: Path, dataset: CocoDataset) -> None:
    run(tmp_path, dataset, config(3))
    (tmp_path / FINAL_CHECKPOINT).with_suffix(".partial").write_bytes(b"half a checkpoint")
    with (tmp_path / METRICS_FILE).open("a") as stream:
        stream.write('{"iteration": 3, "total_loss": 1.0}\n{"iteration": 4, "tot')  # logged, then killed
    result = run(tmp_path, dataset, config(6))
    iterations = [json.loads(line)["iteration"] for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert result.num_resumed == 1
    assert [iterations.count(i) for i in range(6)] == [1] * 6
    assert read_checkpoint(tmp_path / FINAL_CHECKPOINT)["iteration"] == 5


def test_a_finished_run_is_not_trained_again(tmp_path: Path, dataset: CocoDataset) -> None:
    first = run(tmp_path, dataset, config(evaluate_at=(0.0, 1.0)))
    before = (tmp_path / FINAL_CHECKPOINT).read_bytes()
    again = run(tmp_path, dataset, config(evaluate_at=(0.0, 1.0)))
    assert (tmp_path / FINAL_CHECKPOINT).read_bytes() == before
    assert again.ap_curve == first.ap_curve
    assert [(point["iteration"], point["fraction"]) for point in first.ap_curve] == [(0, 0.0), (4, 1.0)]


def test_the_same_seed_trains_the_same_student(tmp_path: Path, dataset: CocoDataset) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run(tmp_path / name, dataset, config(2))
    a, b = (read_checkpoint(tmp_path / name / FINAL_CHECKPOINT)["model"] for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_iteration(tmp_path: Path, dataset: CocoDataset) -> None:
    wild = config(50, learning_rate=1e12, clip_gradient_value=None, checkpoint_period_iters=1)
    with pytest.raises(LossNotFinite, match=r"loss_\w+ is (nan|inf).* at iteration \d+ .*learning_rate"):
        run(tmp_path, dataset, wild, distiller=NoDistillerConfig())


def test_a_gpu_that_is_not_there_is_refused_before_training(tmp_path: Path, dataset: CocoDataset) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceUnavailable, match=r"training\.device=cuda"):
        run(tmp_path, dataset, config(device="cuda"))
    with pytest.raises(DeviceUnavailable, match=r"training\.precision=fp16"):
        run(tmp_path, dataset, config(precision="fp16"))


def test_a_missing_initial_checkpoint_is_refused_by_its_path(tmp_path: Path, dataset: CocoDataset) -> None:
    with pytest.raises(WeightsUnusable, match=r"/nowhere\.pth"):
        run(tmp_path, dataset, config(init_checkpoint="/nowhere.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_iter": 0}, "training.max_iter is 0, expected at least 1"),
        ({"num_workers": -1}, "training.num_workers is -1, expected 0 or more"),
        ({"lr_decay_iters": (3, 1)}, "expected increasing iterations below training.max_iter = 4"),
        ({"learning_rate": -1.0}, "training.learning_rate is -1.0, expected more than 0"),
        ({"evaluate_at": (2.0,)}, "expected fractions from 0 to 1"),
        ({"short_edge_pixels": (400,)}, "none above training.max_edge_pixels = 128"),
    ],
)
def test_values_out_of_range_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_the_teachers_ap_is_measured_wherever_the_students_is_but_at_the_start(
    tmp_path: Path, dataset: CocoDataset
) -> None:
    evaluated = config(evaluate_at=(0.0, 0.5, 1.0))
    plain = tmp_path / "plain"
    plain.mkdir()
    result = run(tmp_path, dataset, evaluated)
    assert [point["iteration"] for point in result.ap_curve] == [0, 2, 4]
    assert [point["iteration"] for point in result.teacher_ap_curve] == [2, 4]
    assert result.teacher_ap_curve[0].keys() == result.ap_curve[0].keys()
    assert run(plain, dataset, evaluated, distiller=NoDistillerConfig()).teacher_ap_curve == []
