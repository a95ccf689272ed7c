"""Train a student with its distiller: detectron2's loader, trainer, hooks and checkpointer, wired together."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.data import build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import JSONWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from training.checkpoint import StudentCheckpointer
from training.config import TrainingConfig
from training.dataset import CheckedMapper, CocoDataset, detectron2_dicts
from training.detection_losses import distilled_levels
from training.distilled_detector import DistillationHook, DistilledDetector
from training.evaluate import DeviceUnavailable, resolve_device
from training.optimization import LearningRateHook, build_optimizers
from training.progress import ProgressWriter, RunHook

METRICS_FILE = "metrics.json"
AP_FILE = "average_precision.json"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished training run was.

    Attributes:
        seconds: of all calls together, evaluation included.
        images_per_second: while training, of the last call.
        ap_curve: ``{"iteration", "fraction", "AP", "AP50", ...}`` in percent at each evaluation.
        num_parameters: of ``student`` and ``distiller``.
        num_resumed: how often the run went on from a checkpoint.
    """

    num_iters: int
    seconds: float
    images_per_second: float
    device: str
    ap_curve: list[dict[str, float]]
    num_parameters: dict[str, int]
    num_resumed: int


class LossNotFinite(FloatingPointError):
    """A loss became infinite or NaN."""

    exit_code = 3


class TrainingInputError(ValueError):
    """What training starts from is missing."""

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
        DeviceUnavailable: the recipe asks for a GPU that is not there.
        TrainingInputError: nothing is left to train on, or the initial checkpoint is missing.
    """
    seed_all_rng(config.seed + comm.get_rank())
    device = resolve_device(config.device)
    if config.precision != "fp32" and device.type == "cpu":
        raise DeviceUnavailable(
            f"training.precision={config.precision} needs a GPU and training runs on the CPU; "
            "use training.precision=fp32"
        )
    # Depthwise convolutions train twice as fast on a CPU in channels-last, dense ones faster still on tensor cores.
    detector = distilled_detector(student, distiller_config).to(device, memory_format=torch.channels_last)
    detector.train()
    run = RunHook(config, detector.student, validation_set, output_directory)
    trainer, checkpointer = _build_trainer(detector, config, output_directory, run)
    _load_initial(checkpointer, config)
    start = 0
    if checkpointer.has_checkpoint():
        checkpointer.resume_or_load("", resume=True)
        start = trainer.iter + 1
        run.num_resumed += 1
        logger.info("going on from iteration %d of %d", start, config.max_iter)
    if comm.is_main_process():
        _drop_metrics_from(output_directory / METRICS_FILE, start)
    trainer.data_loader = _train_loader(student, config, train_set, start)
    seed_all_rng(config.seed + comm.get_rank() + start)
    if start < config.max_iter:
        try:
            trainer.train(start, config.max_iter)
        except FloatingPointError as error:
            raise LossNotFinite(
                f"training diverged: {' '.join(str(error).split())} (iterations counted from 0, of {config.max_iter}). "
                "The checkpoints before it are kept in the run; lower training.learning_rate, lengthen "
                "training.warmup_iters or clip with training.clip_gradient_value=1.0"
            ) from error
    if comm.is_main_process():
        (output_directory / AP_FILE).write_text(json.dumps(run.ap_curve, indent=1))
    return TrainingResult(
        num_iters=config.max_iter,
        seconds=run.seconds,
        images_per_second=run.images_per_second,
        device=str(device),
        ap_curve=run.ap_curve,
        num_parameters={
            "student": sum(p.numel() for p in detector.student.parameters()),
            "distiller": sum(p.numel() for p in detector.distiller.parameters()),
        },
        num_resumed=run.num_resumed,
    )


def distilled_detector(student: nn.Module, distiller_config: Any) -> DistilledDetector:
    """The student with the distiller that ``distiller_config`` describes, sized from the student's pyramid."""
    levels = distilled_levels(student)
    shapes = student.backbone.output_shape()
    distiller = distiller_config.build(
        channels=shapes[levels[0]].channels, num_classes=num_classes_of(student), level_names=levels
    )
    return DistilledDetector(student, distiller, distiller_config.schedule())


def distributed(detector: nn.Module) -> nn.Module:
    """The detector for the process group that is initialised; itself when there is one process."""
    if comm.get_world_size() == 1:
        return detector
    device = next(detector.parameters()).device
    # Batches without objects leave parameters of the teacher without gradients, hence find_unused_parameters.
    return DistributedDataParallel(
        detector,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        find_unused_parameters=True,
    )


def num_classes_of(student: nn.Module) -> int:
    """Number of object classes of a stock detector."""
    return student.num_classes if hasattr(student, "num_classes") else student.roi_heads.num_classes


def _build_trainer(
    detector: DistilledDetector, config: TrainingConfig, output_directory: Path, run: HookBase
) -> tuple[SimpleTrainer, StudentCheckpointer]:
    model = distributed(detector)
    optimizers = build_optimizers(detector, config)
    if config.precision == "fp32":
        trainer = SimpleTrainer(model, [], optimizers)
    else:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
        scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
        trainer = AMPTrainer(model, [], optimizers, grad_scaler=scaler, precision=dtype)
    checkpointer = StudentCheckpointer(
        detector.student, str(output_directory), distiller=detector.distiller, trainer=trainer
    )
    trainer.register_hooks(
        [
            DistillationHook(detector),
            hooks.IterationTimer(),
            LearningRateHook(optimizers, config),
            run,  # before the checkpointer, so that a checkpoint holds the AP measured at its iteration
        ]
    )
    if comm.is_main_process():
        writers = [JSONWriter(str(output_directory / METRICS_FILE)), ProgressWriter(config)]
        trainer.register_hooks(
            [
                hooks.PeriodicWriter(writers, period=config.log_period_iters),
                hooks.PeriodicCheckpointer(
                    checkpointer, config.checkpoint_period_iters, config.max_iter, max_to_keep=2
                ),
            ]
        )
    return trainer, checkpointer


def _load_initial(checkpointer: StudentCheckpointer, config: TrainingConfig) -> None:
    path = config.init_checkpoint
    if path is None or checkpointer.has_checkpoint():
        return
    if "://" not in path and not Path(path).is_file():
        raise TrainingInputError(
            f"training.init_checkpoint={path}: there is no such file; check the path, or leave it out"
        )
    checkpointer.load(path, checkpointables=[])


class _ResumedSampler(TrainingSampler):
    """detectron2's infinite shuffle, from where an interrupted run left it."""

    def __init__(self, size: int, *, seed: int, num_drawn: int) -> None:
        super().__init__(size, seed=seed)
        self._num_drawn = num_drawn

    def __iter__(self) -> Iterator[int]:
        yield from itertools.islice(self._infinite_indices(), self._num_drawn + self._rank, None, self._world_size)


def _train_loader(student: nn.Module, config: TrainingConfig, dataset: CocoDataset, start_iter: int) -> DataLoader:
    records = detectron2_dicts(dataset)
    if config.skip_empty_images:
        records = [r for r in records if any(not a.get("iscrowd", 0) for a in r["annotations"])]
    if not records:
        raise TrainingInputError(
            f"{dataset.annotation_file}: no image has an object, so training.skip_empty_images leaves nothing to "
            "train on"
        )
    resize = T.ResizeShortestEdge(config.short_edge_pixels, config.max_edge_pixels, "choice")
    return build_detection_train_loader(
        dataset=records,
        mapper=CheckedMapper(is_train=True, augmentations=[resize, T.RandomFlip()], image_format=student.input_format),
        sampler=_ResumedSampler(len(records), seed=config.seed, num_drawn=start_iter * config.images_per_batch),
        total_batch_size=config.images_per_batch,
        aspect_ratio_grouping=False,
        num_workers=config.num_workers,
    )


def _drop_metrics_from(path: Path, iteration: int) -> None:
    """Forget what was logged after the checkpoint that training goes on from."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that was being written when the run was killed
        if record["iteration"] < iteration:
            kept.append(line)
    path.write_text("".join(line + "\n" for line in kept))
