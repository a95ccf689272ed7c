"""Optimizer and learning rate of a training run."""

from __future__ import annotations

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn

from training.config import TrainingConfig


def build_optimizer(detector: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """One optimizer for student and distiller: the reference's two have the same settings in 13 of its 14 recipes."""
    parameters = [p for p in detector.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            parameters, config.learning_rate, momentum=0.9, weight_decay=config.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
    limit = config.clip_gradient_value
    if limit is not None:
        optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(parameters, limit))
    return optimizer


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
