"""An exponential moving average of the student's weights, which is evaluated and shipped in their place."""

from __future__ import annotations

import copy

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn


class AverageHook(HookBase):
    """Follows the student with an average of its weights after every iteration.

    The decay after t iterations is ``min(decay, (1 + t) / (10 + t))``, so that the random weights that a training
    starts from are soon forgotten. Batch statistics are averaged like weights; counters are copied.

    Attributes:
        averaged: a detector like the student.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.averaged = copy.deepcopy(student).requires_grad_(False).eval()
        self._decay = decay
        pairs = list(zip(self.averaged.state_dict().values(), student.state_dict().values(), strict=True))
        self._moving: list[tuple[Tensor, Tensor]] = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied: list[tuple[Tensor, Tensor]] = [pair for pair in pairs if not pair[0].is_floating_point()]

    def after_step(self) -> None:
        num_done = self.trainer.iter + 1
        decay = min(self._decay, (1 + num_done) / (10 + num_done))
        averages, weights = zip(*self._moving, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for copied, original in self._copied:
            copied.copy_(original)
