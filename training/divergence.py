"""Noticing that a training diverged: losses that are read rarely, and states that must not be kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor


class LossNotFinite(FloatingPointError):
    """Training diverged: a loss or a weight became infinite or NaN."""

    exit_code = 3


def diverged(what: str) -> LossNotFinite:
    """The error for ``what`` became infinite or NaN, and when."""
    return LossNotFinite(
        f"training diverged: {what} (iterations counted from 0). Checkpoints written before it are good and kept; "
        "lower training.learning_rate, lengthen training.warmup_iters or clip with training.clip_gradient_value=1.0"
    )


class LossRecord:
    """The losses of the latest iterations: on the device when they are added, on the host when they are read."""

    def __init__(self) -> None:
        self._unread: list[tuple[int, Sequence[str], Tensor]] = []
        self._read: list[dict[str, float]] = []

    def add(self, iteration: int, losses: dict[str, Tensor]) -> None:
        self._unread.append((iteration, tuple(losses), torch.stack([v.detach().float() for v in losses.values()])))

    def read(self) -> None:
        """Fetch what was added, in one transfer, and exchange it with the other processes.

        Raises:
            LossNotFinite: names the first iteration with a loss that is not finite, and all such losses of it.
        """
        if not self._unread:
            return
        values = iter(torch.cat([values for _, _, values in self._unread]).tolist())
        own = [(iteration, {name: next(values) for name in names}) for iteration, names, _ in self._unread]
        self._unread = []
        rows = [row for of_process in comm.all_gather(own) for row in of_process]
        for iteration, losses in sorted(rows, key=lambda row: row[0]):
            bad = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
            if bad:
                raise diverged(f"{', '.join(bad)} at iteration {iteration}")
        self._read += [losses for _, losses in rows]

    def means(self) -> dict[str, float]:
        """Of each loss, over the iterations, parts of batches and processes in which there was one."""
        names = {name: None for losses in self._read for name in losses}
        of_name = {name: [losses[name] for losses in self._read if name in losses] for name in names}
        return {name: sum(values) / len(values) for name, values in of_name.items()}

    def forget(self) -> None:
        self._read = []


def names_not_finite(state: Any) -> list[str]:
    """Dotted names of the tensors in nested dicts and lists that hold an infinite number or NaN.

    The device is waited for once.
    """
    named = [(name, tensor) for name, tensor in _tensors(state, "") if tensor.is_floating_point() and tensor.numel()]
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in named:
        by_device.setdefault(tensor.device, []).append((name, tensor))
    found = []
    for group in by_device.values():
        finite = torch.stack([tensor.isfinite().all() for _, tensor in group]).tolist()
        found += [name for (name, _), is_finite in zip(group, finite, strict=True) if not is_finite]
    return found


def _tensors(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}".lstrip("."))
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from _tensors(value, f"{name}.{index}")
