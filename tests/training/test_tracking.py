"""Where a run's numbers go beside the screen."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.training_runs import coco_of_equal_images, config, run
from training.dataset import CocoDataset
from training.tracking import MLFLOW_RUN_FILE, TENSORBOARD_FOLDER, TrackerMissing, check_tracker


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return coco_of_equal_images(tmp_path_factory.mktemp("equal"), size=(64, 96))


def test_tensorboard_is_always_written(tmp_path: Path, dataset: CocoDataset) -> None:
    run(tmp_path, dataset, config(4, evaluate_at=(1.0,)))
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    assert {"total_loss", "loss_cls", "loss_cls.tea", "loss_distill", "lr", "AP"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("total_loss")] == [0, 1, 2, 3]


class FakeMlflow(types.ModuleType):
    """Records what would be sent."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple[str, Any]] = []

    def set_experiment(self, name: str) -> None:
        self.calls.append(("experiment", name))

    def start_run(self, run_id: str | None = None) -> Any:
        self.calls.append(("start", run_id))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-7"))

    def log_params(self, params: dict[str, Any]) -> None:
        self.calls.append(("params", params))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append(("metrics", (step, metrics)))

    def end_run(self) -> None:
        self.calls.append(("end", None))


def test_mlflow_gets_parameters_and_numbers_and_an_interrupted_training_goes_on_in_its_run(
    tmp_path: Path, dataset: CocoDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    run(tmp_path, dataset, config(2, mlflow_experiment="detectors"))
    assert mlflow.calls[:2] == [("experiment", "detectors"), ("start", None)]
    (params,) = [value for name, value in mlflow.calls if name == "params"]
    assert params["training.learning_rate"] == 1e-3
    steps = {step: metrics for name, value in mlflow.calls if name == "metrics" for step, metrics in [value]}
    assert sorted(steps) == [0, 1]
    assert steps[1]["total_loss"] > 0
    assert mlflow.calls[-1] == ("end", None)
    assert (tmp_path / MLFLOW_RUN_FILE).read_text() == "run-7"
    mlflow.calls.clear()
    run(tmp_path, dataset, config(3, mlflow_experiment="detectors"))
    assert mlflow.calls[1] == ("start", "run-7")
    assert [value[0] for name, value in mlflow.calls if name == "metrics"] == [2]


def test_mlflow_that_is_asked_for_and_not_installed_is_an_error_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    check_tracker(config())
    with pytest.raises(TrackerMissing, match=r"mlflow_experiment=x, but the package mlflow cannot be imported"):
        check_tracker(config(mlflow_experiment="x"))
