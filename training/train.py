"""Train a student with its distiller: detectron2's loader, trainer, hooks and checkpointer, wired together."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn

from training.acceleration import check_precision, compile_student, keep_predictions_in_float32
from training.checkpoint import StudentCheckpointer
from training.config import TrainingConfig
from training.dataset import CocoDataset
from training.detection_losses import distilled_levels
from training.distilled_detector import DistillationHook, DistilledDetector
from training.evaluate import resolve_device
from training.head_classes import class_count
from training.initial_weights import load_initial_weights
from training.launch import check_processes, distributed
from training.loader import training_loader
from training.mask_annotations import check_masks, has_mask_head
from training.optimization import LearningRateHook, build_optimizers
from training.progress import ProgressWriter, RunHook
from training.tracking import check_tracker, writers
from training.trainer import Trainer
from training.weight_average import AverageHook

AP_FILE = "average_precision.json"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished training run was.

    Attributes:
        seconds: of all calls together, evaluation included.
        images_per_second: while training, of the last call.
        ap_curve: ``{"iteration", "fraction", "AP", "AP50", ...}`` in percent at each evaluation.
        teacher_ap_curve: the same through the implicit teacher's features, labels given; empty without a teacher.
        num_parameters: of ``student`` and ``distiller``.
        num_resumed: how often the run went on from a checkpoint.
        num_processes: that trained together, at last.
    """

    num_iters: int
    seconds: float
    images_per_second: float
    device: str
    ap_curve: list[dict[str, float]]
    teacher_ap_curve: list[dict[str, float]]
    num_parameters: dict[str, int]
    num_resumed: int
    num_processes: int


class StudentUnsuited(ValueError):
    """The student's pyramid is not one that can be distilled."""

    exit_code = 2


def train(
    student: nn.Module,
    distiller_config: Any,
    config: TrainingConfig,
    *,
    train_set: CocoDataset,
    validation_set: CocoDataset,
    output_directory: Path,
) -> TrainingResult:
    """Train ``student`` and leave ``model_final.pth``, ``metrics.json`` and ``average_precision.json``.

    A call on a directory that holds checkpoints goes on from the last one.

    Args:
        student: a stock detectron2 detector, already built for the data set's number of classes.
        distiller_config: an entry of ``training.distillers.DISTILLERS``; its ``build`` makes the distiller.

    Raises:
        LossNotFinite: training diverged; the last checkpoint is kept.
        DeviceUnavailable: the recipe asks for a GPU that is not there, or for a precision that the device lacks.
        CompilerMissing, TrackerMissing: the recipe asks for what is not installed.
        LaunchError: the batch cannot be shared out to the processes.
        TrainingInputError: nothing is left to train on.
        WeightsUnusable: the initial checkpoint is missing or belongs to another architecture.
        DatasetError: the student draws masks and an annotation has none.
    """
    seed_all_rng(config.seed + comm.get_rank())
    device = resolve_device(config.device)
    check_precision(config, device)
    check_tracker(config)
    check_processes(config, comm.get_world_size())
    check_masks(student, train_set, validation_set)
    # Depthwise convolutions train twice as fast on a CPU in channels-last, dense ones faster still on tensor cores.
    detector = distilled_detector(student, distiller_config).to(device, memory_format=torch.channels_last)
    detector.train()
    loop = _Loop(detector, config, validation_set, output_directory)
    start = loop.resume()
    loop.trainer.data_loader = training_loader(student, config, train_set, start_iter=start)
    if start < config.max_iter:
        # TorchScript (detectron2's focal loss) specialises to what the process has called it with, and rounds otherwise
        # then: a training that goes on in a new process could end elsewhere by the last bits.
        with torch.jit.optimized_execution(device.type != "cpu"):
            loop.trainer.train(start, config.max_iter)
    run = loop.run
    if comm.is_main_process():
        (output_directory / AP_FILE).write_text(json.dumps(run.ap_curve, indent=1))
    return TrainingResult(
        num_iters=config.max_iter,
        seconds=run.seconds,
        images_per_second=run.images_per_second,
        device=str(device),
        ap_curve=run.ap_curve,
        teacher_ap_curve=run.teacher_ap_curve,
        num_parameters={
            "student": sum(p.numel() for p in detector.student.parameters()),
            "distiller": sum(p.numel() for p in detector.distiller.parameters()),
        },
        num_resumed=run.num_resumed,
        num_processes=comm.get_world_size(),
    )


def distilled_detector(student: nn.Module, distiller_config: Any) -> DistilledDetector:
    """The student with the distiller that ``distiller_config`` describes, sized from the student's pyramid.

    Raises:
        UnsupportedStudent: no losses on given features are known for this kind of detector.
        StudentUnsuited: its pyramid lacks a level, the levels have different channels, or it has no mask head and the
            distiller reads instance masks, which are loaded for such a head alone.
    """
    levels = distilled_levels(student)
    shapes = student.backbone.output_shape()
    missing = [level for level in levels if level not in shapes]
    if missing:
        raise StudentUnsuited(
            f"the head reads the levels {', '.join(levels)} and the backbone has no {', '.join(missing)}, only "
            f"{', '.join(shapes)}; make model.head_in_features and the pyramid agree"
        )
    if len({shapes[level].channels for level in levels}) > 1:
        raise StudentUnsuited(
            "the distiller treats all levels of a pyramid alike and those of the student differ in channels: "
            f"{', '.join(f'{level} has {shapes[level].channels}' for level in levels)}; put an FPN between the network "
            "and the head"
        )
    if getattr(distiller_config, "use_masks", False) and not has_mask_head(student):
        raise StudentUnsuited(
            "distiller.use_masks is true and the student has no mask head, so no instance masks are loaded; train a "
            "detector of masks, such as mask_rcnn, or set distiller.use_masks=false"
        )
    distiller = distiller_config.build(
        channels=shapes[levels[0]].channels, num_classes=class_count(student), level_names=levels
    )
    return DistilledDetector(student, distiller, distiller_config.schedule())


class _Loop:
    """The trainer with its hooks, and the checkpointer that it goes on from."""

    def __init__(
        self, detector: DistilledDetector, config: TrainingConfig, validation_set: CocoDataset, directory: Path
    ) -> None:
        self._config, self._directory = config, directory
        student = detector.student
        if config.init_checkpoint is not None and not (directory / "last_checkpoint").exists():
            load_initial_weights(student, config.init_checkpoint)
        average = None if config.ema_decay is None else AverageHook(student, config.ema_decay)
        shipped = student if average is None else average.averaged
        trained_apart = {} if average is None else {"student_without_average": student}
        keep_predictions_in_float32(student)
        if config.compile:
            compile_student(student)
        optimizers = build_optimizers(detector, config)
        self.run = RunHook(config, shipped, detector, validation_set, directory)
        self.trainer = Trainer(distributed(detector), optimizers, config, next(detector.parameters()).device)
        self.checkpointer = StudentCheckpointer(
            shipped, str(directory), distiller=detector.distiller, trainer=self.trainer, **trained_apart
        )
        steps: list[HookBase | None] = [DistillationHook(detector), hooks.IterationTimer()]
        # The evaluation goes before the checkpointer, so that a checkpoint holds the AP measured at its iteration.
        steps += [LearningRateHook(optimizers, config), average, self.run]
        self.trainer.register_hooks(steps)

    def resume(self) -> int:
        """Go on from the last checkpoint, if there is one; the iteration to start at."""
        config, start = self._config, 0
        if self.checkpointer.has_checkpoint():
            self.checkpointer.resume_or_load("", resume=True)
            start = self.trainer.iter + 1
            self.run.num_resumed += 1
            logger.info("going on from iteration %d of %d", start, config.max_iter)
        if comm.is_main_process() and start < config.max_iter:
            written = [*writers(config, self._directory, start), ProgressWriter(config)]
            periodic = hooks.PeriodicCheckpointer(
                self.checkpointer, config.checkpoint_period_iters, config.max_iter, max_to_keep=2
            )
            self.trainer.register_hooks([hooks.PeriodicWriter(written, period=config.log_period_iters), periodic])
        return start
