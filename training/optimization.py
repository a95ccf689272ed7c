"""Optimizers and learning rate of a training run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from detectron2.engine import HookBase
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn

from training.config import OptimizerConfig, TrainingConfig
from training.distilled_detector import DistilledDetector


class Optimizers:
    """Optimizers of disjoint parameters that step, are cleared and are saved together.

    To a trainer and to a ``GradScaler`` it is one optimizer.

    Args:
        by_owner: each by the name of the part that it trains.
    """

    def __init__(self, by_owner: Mapping[str, torch.optim.Optimizer]) -> None:
        self.by_owner = dict(by_owner)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, to read or to change in place."""
        return [group for optimizer in self.by_owner.values() for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        for optimizer in self.by_owner.values():
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.by_owner.values():
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {owner: optimizer.state_dict() for owner, optimizer in self.by_owner.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for owner, optimizer in self.by_owner.items():
            optimizer.load_state_dict(state_dict[owner])


def build_optimizers(detector: DistilledDetector, config: TrainingConfig) -> Optimizers:
    """One optimizer for everything, or with ``training.teacher_optimizer`` a second one for the implicit teacher.

    The distiller says which parameters are the teacher's; what else it holds, such as an adapter of the student's
    features, is trained with the student. In 13 of the reference's 14 recipes both optimizers have the same settings,
    so that one is the same as two.
    """
    of_student = OptimizerConfig(
        optimizer=config.optimizer, learning_rate=config.learning_rate, weight_decay=config.weight_decay
    )
    trained = [p for p in detector.parameters() if p.requires_grad]
    if config.teacher_optimizer is None:
        return Optimizers({"student": _optimizer(trained, of_student, config.clip_gradient_value)})
    is_teachers = {id(p) for p in detector.distiller.teacher_parameters()}
    parts = {
        "student": ([p for p in trained if id(p) not in is_teachers], of_student),
        "teacher": ([p for p in trained if id(p) in is_teachers], config.teacher_optimizer),
    }
    return Optimizers(
        {
            owner: _optimizer(parameters, settings, config.clip_gradient_value)
            for owner, (parameters, settings) in parts.items()
            if parameters
        }
    )


def _optimizer(
    parameters: Iterable[nn.Parameter], settings: OptimizerConfig, clip_gradient_value: float | None
) -> torch.optim.Optimizer:
    parameters = list(parameters)
    if settings.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            parameters, settings.learning_rate, momentum=0.9, weight_decay=settings.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
    if clip_gradient_value is not None:
        optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(parameters, clip_gradient_value))
    return optimizer


class LearningRateHook(HookBase):
    """Sets every optimizer's learning rate from the iteration alone, so that there is nothing to save or to resume."""

    def __init__(self, optimizers: Optimizers, config: TrainingConfig) -> None:
        self._groups = [(optimizer, optimizer.param_groups[0]["lr"]) for optimizer in optimizers.by_owner.values()]
        self._factor = learning_rate_factor(config)
        self._max_iter = config.max_iter

    def before_step(self) -> None:
        factor = self._factor(self.trainer.iter / self._max_iter)
        for optimizer, peak in self._groups:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        self.trainer.storage.put_scalar("lr", self._groups[0][1] * factor, smoothing_hint=False)


def learning_rate_factor(config: TrainingConfig) -> ParamScheduler:
    """The multiplier of the learning rate over training progress in [0, 1]."""
    warmup = min(config.warmup_iters / config.max_iter, 0.5)
    if config.lr_schedule == "cosine":
        main: ParamScheduler = CosineParamScheduler(1.0, 0.0)
    else:
        values = [0.1**i for i in range(len(config.lr_decay_iters) + 1)]
        main = MultiStepParamScheduler(values, milestones=config.lr_decay_iters, num_updates=config.max_iter)
    if warmup == 0:
        return main
    return CompositeParamScheduler(
        [LinearParamScheduler(1e-3, main(warmup)), main], [warmup, 1 - warmup], ["rescaled", "fixed"]
    )
