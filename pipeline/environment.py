"""Facts about this machine: processor, memory, GPUs, versions, commit. Imports none of the libraries it names."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import RecipeError

# What is reported as: the distributions that carry it, the first one installed counts.
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "detectron2": ("detectron2", "sal-detectron2"),
    "timm": ("timm",),
    "numpy": ("numpy",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt-rtx"),
    "tritonclient": ("tritonclient",),
    "tritonserver": ("nvidia-pytriton",),
}


@functools.cache
def check_not_launched() -> None:
    """Raise :class:`RecipeError` when torchrun started this process: it starts the training, not the pipeline."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise RecipeError(
            "torchrun started the pipeline itself; start it once and let it call torchrun for the training: "
            '--launch "torchrun --nproc-per-node=8"'
        )


def facts() -> dict[str, Any]:
    """Everything known about this machine, as plain JSON; what could not be found out is None."""
    gpus, driver, gpu_reason = _gpus()
    commit, dirty = _commit(Path(__file__).resolve().parent.parent)
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "gpu_driver": driver,
        "gpu_reason": gpu_reason,
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),  # which of them is the first
        "versions": {name: _version(distributions) for name, distributions in DISTRIBUTIONS.items()},
        "commit": commit,
        "dirty": dirty,
    }


def declared(keys: Iterable[str]) -> dict[str, Any]:
    """The facts a stage depends on, for its fingerprint.

    Args:
        keys: names of ``DISTRIBUTIONS`` (their version) or of other facts such as ``"gpus"``.

    Raises:
        ValueError: no such fact.
    """
    found: dict[str, Any] = {}
    for key in keys:
        if key in DISTRIBUTIONS:
            found[key] = _version(DISTRIBUTIONS[key])
        elif key in facts():
            found[key] = facts()[key]
        else:
            raise ValueError(f"no environment fact {key!r}; there are {sorted({*DISTRIBUTIONS, *facts()})}")
    return found


def _version(distributions: tuple[str, ...]) -> str | None:
    """Distribution and version, because a distribution such as nvidia-pytriton counts by its own numbers."""
    for name in distributions:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpus() -> tuple[list[dict[str, Any]], str | None, str | None]:
    """The NVIDIA GPUs, their driver, and the reason when there is none."""
    import pynvml  # 0.1 s that only a caller who wants to know pays

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], None, f"no NVIDIA GPU ({error})"
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = [
            {
                "name": pynvml.nvmlDeviceGetName(handle),
                "memory_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
                "compute_capability": ".".join(map(str, pynvml.nvmlDeviceGetCudaComputeCapability(handle))),
            }
            for handle in handles
        ]
        return gpus, pynvml.nvmlSystemGetDriverVersion(), None if gpus else "no NVIDIA GPU (the driver lists none)"
    except pynvml.NVMLError as error:
        return [], None, f"NVIDIA driver present, its GPUs unreadable ({error})"
    finally:
        pynvml.nvmlShutdown()


def _commit(root: Path) -> tuple[str | None, bool | None]:
    """The checkout's commit and whether tracked files differ from it; None outside a checkout or without git."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
