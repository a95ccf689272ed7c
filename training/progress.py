"""What a person sees of a training run: AP on the way, and a line of losses, speed and time left."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from torch import nn

from training.config import TrainingConfig
from training.dataset import CocoDataset
from training.distilled_detector import DistilledDetector
from training.evaluate import evaluate_detector
from training.teacher_evaluation import evaluate_teacher, has_teacher

logger = logging.getLogger(__name__)


class RunHook(HookBase):
    """Measures AP at the asked fractions of training, and the run's time, through interruptions.

    Args:
        shipped: the student that the checkpoints hold.
        detector: the student that trains with its distiller; where that makes features from labels, their AP is
            measured too.
    """

    def __init__(
        self,
        config: TrainingConfig,
        shipped: nn.Module,
        detector: DistilledDetector,
        dataset: CocoDataset,
        directory: Path,
    ) -> None:
        self._config, self._shipped, self._detector = config, shipped, detector
        self._dataset, self._directory = dataset, directory
        self._at = {round(fraction * config.max_iter): fraction for fraction in config.evaluate_at}
        self.ap_curve: list[dict[str, float]] = []
        self.teacher_ap_curve: list[dict[str, float]] = []
        self.seconds = 0.0
        self.images_per_second = 0.0
        self.num_resumed = 0
        self._step_seconds: list[float] = []

    def before_train(self) -> None:
        self._started = time.perf_counter()
        if self.trainer.start_iter == 0:
            self._evaluate(0)

    def before_step(self) -> None:
        self._step_started = time.perf_counter()

    def after_step(self) -> None:
        self._step_seconds.append(time.perf_counter() - self._step_started)
        self._evaluate(self.trainer.iter + 1)

    def after_train(self) -> None:
        self.seconds += time.perf_counter() - self._started
        if self._step_seconds:
            self.images_per_second = self._config.images_per_batch * len(self._step_seconds) / sum(self._step_seconds)

    def _evaluate(self, iteration: int) -> None:
        if iteration not in self._at:
            return
        if comm.is_main_process():
            at = {"iteration": iteration, "fraction": self._at[iteration]}
            scores = evaluate_detector(self._shipped, self._dataset, **self._evaluation("evaluation"))
            get_event_storage().put_scalar("AP", scores["AP"], smoothing_hint=False)
            self.ap_curve.append({**at, **scores})
            of_teacher = ""
            if iteration and has_teacher(self._detector):
                known = evaluate_teacher(self._detector, self._dataset, **self._evaluation("teacher_evaluation"))
                get_event_storage().put_scalar("AP.tea", known["AP"], smoothing_hint=False)
                self.teacher_ap_curve.append({**at, **known})
                of_teacher = f"  AP through the teacher, labels given, {known['AP']:.1f}"
            logger.info(
                "iteration %d of %d: AP %.1f  AP50 %.1f%s",
                iteration,
                self._config.max_iter,
                scores["AP"],
                scores["AP50"],
                of_teacher,
            )
        comm.synchronize()

    def _evaluation(self, folder: str) -> dict[str, Any]:
        return {
            "short_edge_pixels": max(self._config.short_edge_pixels),
            "max_edge_pixels": self._config.max_edge_pixels,
            "output_directory": self._directory / folder,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "ap_curve": self.ap_curve,
            "teacher_ap_curve": self.teacher_ap_curve,
            "seconds": self.seconds + time.perf_counter() - self._started,
            "num_resumed": self.num_resumed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ap_curve = state_dict["ap_curve"]
        self.teacher_ap_curve = state_dict["teacher_ap_curve"]
        self.seconds = state_dict["seconds"]
        self.num_resumed = state_dict["num_resumed"]


class ProgressWriter(EventWriter):
    """One line for a person: losses, images a second, time left."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config

    def write(self) -> None:
        storage = get_event_storage()
        histories = storage.histories()
        # detectron2 writes once more after the last iteration, and when a training ends before losses were ever read.
        if not {"time", "total_loss"} <= set(histories) or storage.iter >= self._config.max_iter:
            return
        seconds = histories["time"].median(self._config.log_period_iters)
        left = int(seconds * (self._config.max_iter - storage.iter - 1))
        losses = "  ".join(
            f"{name.removeprefix('loss_')} {history.latest():.3f}"
            for name, history in histories.items()
            if "loss" in name and name != "total_loss"
        )
        logger.info(
            "iteration %d of %d  loss %.3f (%s)%s  %.1f images/s  %d:%02d left",
            storage.iter + 1,
            self._config.max_iter,
            histories["total_loss"].latest(),
            losses,
            f"  AP {histories['AP'].latest():.1f}" if "AP" in histories else "",
            self._config.images_per_batch / seconds,
            left // 60,
            left % 60,
        )
