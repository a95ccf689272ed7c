"""One training iteration: forward passes in the asked precision, one backward pass each, and all optimizers' steps.

Nothing in an iteration waits for the GPU but what a detector's own losses do: loss values stay on the device until
they are written, ``training.log_period_iters`` at a time. That is also when a loss that is not finite is noticed, and
before any checkpoint is written.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training.config import TrainingConfig
from training.divergence import LossRecord
from training.loader import seed_forward
from training.optimization import Optimizers

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# detectron2 writes a traceback of whatever ends a training; who catches the exception decides what is shown.
logging.getLogger("detectron2.engine.train_loop").setLevel(logging.CRITICAL)


class Trainer(SimpleTrainer):
    """detectron2's trainer with gradient accumulation, mixed precision, and losses that are read rarely.

    Args:
        model: the ``DistilledDetector``, or DDP around it.
        device: of the model.
    """

    def __init__(self, model: nn.Module, optimizers: Optimizers, config: TrainingConfig, device: torch.device) -> None:
        super().__init__(model, [], optimizers)
        self._config, self._device = config, device
        self._losses = LossRecord()
        self.grad_scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def run_step(self) -> None:
        # TorchScript, which detectron2's focal loss is in, computes its first two calls in a process otherwise than the
        # rest. They differ in the last bits, and a run that goes on in a new process has to end where it would have.
        with torch.jit.optimized_execution(False):
            self._step()

    def _step(self) -> None:
        assert self.model.training
        num_parts = self._config.accumulate_batches
        data_seconds = 0.0
        self.optimizer.zero_grad()
        for part in range(num_parts):
            started = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_seconds += time.perf_counter() - started
            seed_forward(self._config.seed, self.iter * num_parts + part)
            with self._gradients_exchanged(part == num_parts - 1):
                with self._autocast():
                    losses = self.model(batch)
                    total = sum(losses.values()) / num_parts
                self.grad_scaler.scale(total).backward()
            self._losses.add(self.iter, losses)
        self.after_backward()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self.storage.put_scalar("data_time", data_seconds)
        self._read_losses()

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = AUTOCAST_TYPES.get(self._config.precision)
        return nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)

    def _gradients_exchanged(self, exchanged: bool) -> AbstractContextManager[Any]:
        """Processes exchange gradients once an iteration, with its last part."""
        if exchanged or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _read_losses(self) -> None:
        """Log the mean losses when they are due; stop when one was not finite.

        All processes come here together and see the same values.
        """
        num_done = self.iter + 1
        is_logged = num_done % self._config.log_period_iters == 0 or num_done == self._config.max_iter
        if is_logged or num_done % self._config.checkpoint_period_iters == 0:
            self._losses.read()
            if is_logged and comm.is_main_process():
                means = self._losses.means()
                self.storage.put_scalars(total_loss=sum(means.values()), **means, smoothing_hint=False)
            if is_logged:
                self._losses.forget()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
