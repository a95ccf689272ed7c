"""Where the numbers of a run are written beside the screen: ``metrics.json``, TensorBoard, MLflow."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter, get_event_storage

from training.config import TrainingConfig

METRICS_FILE = "metrics.json"
TENSORBOARD_FOLDER = "tensorboard"
MLFLOW_RUN_FILE = "mlflow_run.txt"


class TrackerMissing(RuntimeError):
    """The recipe logs to a tracker whose package is not installed."""

    exit_code = 4


def check_tracker(config: TrainingConfig) -> None:
    """Refuse ``training.mlflow_experiment`` where MLflow is not installed.

    Raises:
        TrackerMissing: it is not.
    """
    if config.mlflow_experiment is None:
        return
    try:
        importlib.import_module("mlflow")
    except ImportError as error:
        raise TrackerMissing(
            f"training.mlflow_experiment={config.mlflow_experiment}, but the package mlflow cannot be imported "
            f"({error}). Install it with .venv/bin/python -m pip install mlflow-skinny, or leave the key out: "
            "TensorBoard is written in any case"
        ) from error


def writers(config: TrainingConfig, directory: Path, start_iter: int) -> list[EventWriter]:
    """What writes the run's numbers; what was written from ``start_iter`` on by an interrupted run is dropped."""
    drop_metrics_from(directory / METRICS_FILE, start_iter)
    found: list[EventWriter] = [
        JSONWriter(str(directory / METRICS_FILE)),
        TensorboardXWriter(str(directory / TENSORBOARD_FOLDER), purge_step=start_iter),
    ]
    if config.mlflow_experiment is not None:
        found.append(MlflowWriter(config, directory))
    return found


class MlflowWriter(EventWriter):
    """Logs the recipe's training section and every scalar to one MLflow run; an interrupted training goes on in it.

    MLflow's own settings say where its server is.
    """

    def __init__(self, config: TrainingConfig, directory: Path) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._last_written = -1
        self._mlflow.set_experiment(config.mlflow_experiment)
        known = directory / MLFLOW_RUN_FILE
        if known.exists():
            self._mlflow.start_run(run_id=known.read_text())
        else:
            run = self._mlflow.start_run()
            known.write_text(run.info.run_id)
            self._mlflow.log_params({f"training.{k}": v for k, v in dataclasses.asdict(config).items()})

    def write(self) -> None:
        latest = get_event_storage().latest()
        news = {name: (value, at) for name, (value, at) in latest.items() if at > self._last_written}
        for iteration in sorted({at for _, at in news.values()}):
            metrics = {_mlflow_name(name): value for name, (value, at) in news.items() if at == iteration}
            self._mlflow.log_metrics(metrics, step=iteration)
            self._last_written = iteration

    def close(self) -> None:
        self._mlflow.end_run()


def _mlflow_name(name: str) -> str:
    """MLflow takes letters, digits and ``_-./ :`` in names."""
    return "".join(c if c.isalnum() or c in "_-./ :" else "_" for c in name)


def drop_metrics_from(path: Path, iteration: int) -> None:
    """Forget what was logged after the checkpoint that training goes on from."""
    if path.exists():
        path.write_text("".join(f"{line}\n" for line in _lines_before(path, iteration)))


def _lines_before(path: Path, iteration: int) -> Iterator[str]:
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that was being written when the run was killed
        if record["iteration"] < iteration:
            yield line
