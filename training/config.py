"""The recipe's ``training`` section."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer of its own for the implicit teacher; learning-rate schedule and clipping are the student's.

    Attributes:
        optimizer: ``"sgd"`` with momentum 0.9, or ``"adamw"``.
        learning_rate: peak value.
        weight_decay: on every parameter.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, expected more than 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a student is trained.

    Attributes:
        max_iter: number of iterations.
        images_per_batch: of one iteration, over all processes and all parts of the batch.
        accumulate_batches: the batch is computed in this many parts, one after the other, whose gradients are averaged:
            a large batch on a small GPU. A detector with a running loss normaliser updates it once a part.
        optimizer: ``"sgd"`` with momentum 0.9, or ``"adamw"``.
        learning_rate: peak value, of student and distiller.
        weight_decay: on every parameter, norms and biases included, as the LGD reference does.
        teacher_optimizer: of the implicit teacher alone; None: it is trained like the student.
        lr_schedule: ``"cosine"`` to zero, or ``"multistep"`` by 0.1 at ``lr_decay_iters``.
        warmup_iters: linear warm-up from a thousandth of the learning rate.
        clip_gradient_value: every gradient element is clipped to this magnitude; None: no clipping.
        short_edge_pixels: each image's shortest edge is resized to one of these, at random.
        max_edge_pixels: upper limit of the longest edge.
        skip_empty_images: leave out images that have no object.
        num_workers: loader processes beside each training process; 0: load in the training process.
        checkpoint_period_iters: a checkpoint is written this often.
        log_period_iters: a progress line is written this often.
        evaluate_at: fractions of training at which AP on the validation set is measured.
        device: ``"auto"`` takes the GPU where there is one.
        precision: of convolutions and matrix products; predictions and losses stay in float32. ``"fp16"`` scales the
            loss and needs a GPU, ``"bf16"`` does neither.
        compile: compile the network below the pyramid and the head with ``torch.compile``; needs a C++ compiler.
        ema_decay: evaluate and ship an exponential moving average of the student's weights, for example 0.9998; None:
            the weights themselves. The average warms up: its decay after t iterations is at most (1 + t) / (10 + t).
        seed: of initialisation, order and augmentation.
        init_checkpoint: a student checkpoint or detectron2 model-zoo file to start from.
        mlflow_experiment: log the run to this MLflow experiment too; needs the package ``mlflow``.
    """

    max_iter: int
    images_per_batch: int
    accumulate_batches: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float
    weight_decay: float = 1e-4
    teacher_optimizer: OptimizerConfig | None = None
    lr_schedule: Literal["cosine", "multistep"] = "multistep"
    lr_decay_iters: tuple[int, ...] = ()
    warmup_iters: int = 1000
    clip_gradient_value: float | None = 1.0
    short_edge_pixels: tuple[int, ...]
    max_edge_pixels: int
    skip_empty_images: bool = True
    num_workers: int = 2
    checkpoint_period_iters: int = 1000
    log_period_iters: int = 20
    evaluate_at: tuple[float, ...] = (0.0, 0.25, 1.0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    ema_decay: float | None = None
    seed: int = 0
    init_checkpoint: str | None = None
    mlflow_experiment: str | None = None

    def __post_init__(self) -> None:
        for field in ("lr_decay_iters", "short_edge_pixels", "evaluate_at"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in (
            "max_iter",
            "images_per_batch",
            "accumulate_batches",
            "checkpoint_period_iters",
            "log_period_iters",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"training.{field} is {getattr(self, field)}, expected at least 1")
        if self.seed < 0:
            raise ValueError(f"training.seed is {self.seed}, expected 0 or more")
        if self.num_workers < 0:
            raise ValueError(f"training.num_workers is {self.num_workers}, expected 0 or more")
        increasing = all(a < b for a, b in itertools.pairwise((0, *self.lr_decay_iters, self.max_iter)))
        if self.lr_decay_iters and not increasing:
            raise ValueError(
                f"training.lr_decay_iters is {self.lr_decay_iters}, expected increasing iterations below "
                f"training.max_iter = {self.max_iter}"
            )
        if self.learning_rate <= 0:
            raise ValueError(f"training.learning_rate is {self.learning_rate}, expected more than 0")
        if self.images_per_batch % self.accumulate_batches:
            raise ValueError(
                f"training.images_per_batch is {self.images_per_batch}, expected a multiple of "
                f"training.accumulate_batches = {self.accumulate_batches}"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"training.ema_decay is {self.ema_decay}, expected a number between 0 and 1, or null")
        if any(not 0 <= fraction <= 1 for fraction in self.evaluate_at):
            raise ValueError(f"training.evaluate_at is {self.evaluate_at}, expected fractions from 0 to 1")
        if not self.short_edge_pixels or max(self.short_edge_pixels) > self.max_edge_pixels:
            raise ValueError(
                f"training.short_edge_pixels is {self.short_edge_pixels}, expected one or more sizes, none above "
                f"training.max_edge_pixels = {self.max_edge_pixels}"
            )
