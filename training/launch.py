"""Training in several processes that ``torchrun`` starts, on one node or on several."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training.config import TrainingConfig
from training.evaluate import resolve_device

# Other processes wait while the first one evaluates on the whole validation set.
_PATIENCE = datetime.timedelta(hours=3)
_RENDEZVOUS_OPTIONS = ("--standalone", "--rdzv", "--master", "--node")


class LaunchError(ValueError):
    """The launch command is not one, or its number of processes does not fit the recipe or the machine."""

    exit_code = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """A command that starts the training's processes; ``command`` of its parts ends where the program would follow.

    Attributes:
        text: as given.
        spans_nodes: the processes run elsewhere too, so this machine's GPUs say nothing about the others'.
    """

    text: str
    command: tuple[str, ...]
    num_nodes: int
    processes_per_node: int
    spans_nodes: bool

    @property
    def num_processes(self) -> int:
        return self.num_nodes * self.processes_per_node


def parse_launch(text: str) -> Launch:
    """Read ``torchrun --nproc-per-node=8 ...``, with another launcher such as ``srun`` in front or not.

    Raises:
        LaunchError: it does not call torchrun, or torchrun does not take its options.
    """
    from torch.distributed.run import determine_local_world_size, parse_min_max_nnodes

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise LaunchError(f"launch command {text!r} cannot be read: {error}") from error
    at = next((i for i, word in enumerate(words) if Path(word).name == "torchrun"), None)
    if at is None:
        raise LaunchError(
            f'launch command {text!r} does not call torchrun; expected for example "torchrun --nproc-per-node=8"'
        )
    before, options = words[:at], words[at + 1 :]
    arguments = _torchrun_arguments(text, options)
    try:
        fewest, most = parse_min_max_nnodes(arguments.nnodes)
        processes_per_node = determine_local_world_size(arguments.nproc_per_node)
    except (ValueError, RuntimeError) as error:
        raise LaunchError(f"launch command {text!r}: {error}") from error
    if fewest != most:
        raise LaunchError(
            f"launch command {text!r} asks for {fewest} to {most} nodes; the number of processes has to be known: give "
            "--nnodes=N"
        )
    if most == 1 and not any(option.replace("_", "-").startswith(_RENDEZVOUS_OPTIONS) for option in options):
        options = ["--standalone", *options]  # a free port, so that two trainings on one machine do not meet
    return Launch(
        text=text,
        command=(*before, sys.executable, "-m", "torch.distributed.run", *options),
        num_nodes=most,
        processes_per_node=processes_per_node,
        spans_nodes=most > 1 or bool(before),
    )


def _torchrun_arguments(text: str, options: Sequence[str]) -> Any:
    from torch.distributed.run import get_args_parser

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            arguments = get_args_parser().parse_args([*options, "PROGRAM"])
    except SystemExit:
        lines = complaint.getvalue().strip().splitlines() or ["unknown option"]
        raise LaunchError(f"launch command {text!r}: torchrun does not take it: {lines[-1]}") from None
    if arguments.training_script != "PROGRAM" or arguments.module or arguments.no_python:
        raise LaunchError(f"launch command {text!r} names a program; give torchrun and its options alone")
    return arguments


def check_processes(config: TrainingConfig, num_processes: int) -> None:
    """Refuse a batch that cannot be shared out evenly.

    Raises:
        LaunchError: ``images_per_batch`` is not a multiple of processes times parts.
    """
    shares = num_processes * config.accumulate_batches
    if config.images_per_batch % shares:
        parts = f" x {config.accumulate_batches} parts" if config.accumulate_batches > 1 else ""
        below, above = config.images_per_batch // shares * shares, -(-config.images_per_batch // shares) * shares
        near = f"{below} or {above}" if below else f"{above}"
        raise LaunchError(
            f"training.images_per_batch is {config.images_per_batch}, which cannot be shared out evenly to "
            f"{num_processes} processes{parts}; give training.images_per_batch={near} (with the learning rate to "
            "match), or start another number of processes"
        )


def check_launch(launch: Launch, config: TrainingConfig) -> None:
    """Refuse, before anything is started, what the processes would fail at.

    Raises:
        LaunchError: the batch cannot be shared out, or there are more processes than GPUs.
        DeviceUnavailable: ``training.device=cuda`` and there is no GPU.
    """
    check_processes(config, launch.num_processes)
    if launch.spans_nodes or resolve_device(config.device).type != "cuda":
        return
    num_gpus = torch.cuda.device_count()
    if launch.processes_per_node > num_gpus:
        raise LaunchError(
            f"launch command {launch.text!r} starts {launch.processes_per_node} processes and this machine has "
            f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}; a process needs one of its own: --nproc-per-node={num_gpus}"
        )


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, and take this one's GPU.

    Raises:
        LaunchError: the node has fewer GPUs than processes.
        DeviceUnavailable: see :func:`training.evaluate.resolve_device`.
    """
    local_rank, on_node = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    uses_gpu = resolve_device(device).type == "cuda"
    if uses_gpu:
        if on_node > torch.cuda.device_count():
            raise LaunchError(
                f"{on_node} processes on a node with {torch.cuda.device_count()} GPUs; a process needs one of its own"
            )
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group("nccl" if uses_gpu else "gloo", timeout=_PATIENCE)
    try:
        comm.create_local_process_group(on_node)
        yield
    finally:
        torch.distributed.destroy_process_group()


def distributed(detector: nn.Module) -> nn.Module:
    """The detector for the process group that is initialised; itself when there is one process."""
    if comm.get_world_size() == 1:
        return detector
    # The detector sends its inputs to the device itself, hence no device_ids. Batches without objects, and a frozen
    # network, leave parameters without gradients, hence find_unused_parameters.
    return DistributedDataParallel(detector, broadcast_buffers=False, find_unused_parameters=True)
