"""What published trainings share: schedules, image sizes, ImageNet weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from detectron2.config import LazyCall as L

from training.config import TrainingConfig


class Schedule(NamedTuple):
    """Iterations of 16 images, where the learning rate falls to a tenth, and how long it rises at the start."""

    max_iter: int
    lr_decay_iters: tuple[int, ...]
    warmup_iters: int


COCO_1X = Schedule(90_000, (60_000, 80_000), 1000)
COCO_2X = Schedule(180_000, (120_000, 160_000), 1000)
COCO_3X = Schedule(270_000, (210_000, 250_000), 1000)
COCO_12_EPOCHS = Schedule(87_960, (58_640, 80_630), 500)  # of 7,330 iterations, decay after 8 and 11: mmdetection's 1x
VOC_SCHEDULE = Schedule(18_000, (12_000, 16_000), 100)  # detectron2's PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml
CROWDHUMAN_SCHEDULE = Schedule(28_000, (22_400, 25_200), 1000)  # 30 epochs, decay after 24 and 27

MULTI_SCALE = (640, 672, 704, 736, 768, 800)
SINGLE_SCALE = (800,)
VOC_SCALES = (480, 512, 544, 576, 608, *MULTI_SCALE)

# ImageNet weights. detectron2 downloads those of its zoo; training.init_checkpoint=FILE takes a local copy.
MSRA_R50 = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
MSRA_R101 = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
FAIR_X101_32X8D = "detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl"
TORCHVISION_R50 = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
TORCHVISION_R18 = "weights/resnet18-f37072fd.pth"  # of torchvision; detectron2's zoo has neither
TORCHVISION_R34 = "weights/resnet34-b627a593.pth"
SWIN_TINY = "weights/swin_tiny_patch4_window7_224.pth"  # of github.com/microsoft/Swin-Transformer; no zoo has it


def published_training(
    schedule: Schedule,
    *,
    learning_rate: float,
    init_checkpoint: str,
    short_edge_pixels: Sequence[int] = MULTI_SCALE,
    max_edge_pixels: int = 1333,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    weight_decay: float = 1e-4,
    teacher_optimizer: Any = None,
    clip_gradient_value: float | None = 1.0,
) -> Any:
    """The ``training`` section that all published trainings share: 16 images a batch, horizontal flips, weight decay on
    every parameter. Arguments as of :class:`TrainingConfig`.

    A batch of 16 takes eight GPUs of 11 GB; on one GPU ``training.accumulate_batches=8`` computes it two images at a
    time, and ``training.precision=bf16`` halves what the features need.
    """
    return L(TrainingConfig)(
        max_iter=schedule.max_iter,
        images_per_batch=16,
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        teacher_optimizer=teacher_optimizer,
        lr_schedule="multistep",
        lr_decay_iters=list(schedule.lr_decay_iters),
        warmup_iters=schedule.warmup_iters,
        clip_gradient_value=clip_gradient_value,
        short_edge_pixels=list(short_edge_pixels),
        max_edge_pixels=max_edge_pixels,
        num_workers=4,
        checkpoint_period_iters=5000,
        evaluate_at=[0.25, 0.5, 0.75, 1.0],
        init_checkpoint=init_checkpoint,
    )
