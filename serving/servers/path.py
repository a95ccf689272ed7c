"""The ``tritonserver`` found on PATH, with the backends installed beside it: what NVIDIA's image contains."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from serving.servers.running import LOOPBACK, Ports, RunningServer, ServerError, start_process, tritonserver_arguments


def check() -> None:
    """Raises ``ServerError`` when no tritonserver is on PATH."""
    if shutil.which("tritonserver") is None:
        raise ServerError(
            "serving.server=path: no tritonserver on PATH; run inside NVIDIA's Triton image, or use "
            "serving.server=wheel or serving.server=container"
        )


def start(
    repository: Path,
    model_names: Sequence[str],
    *,
    ports: Ports = Ports(),  # noqa: B008 (frozen)
    log_path: Path,
    use_gpu: bool = False,
    ready_timeout_seconds: float = 120.0,
) -> RunningServer:
    """Serve models of a repository on loopback ports; arguments as of ``servers.wheel.start``."""
    check()
    ports = ports.reserve()
    binary = shutil.which("tritonserver") or "tritonserver"
    arguments = tritonserver_arguments(repository.resolve(), model_names, ports, LOOPBACK)
    return start_process(
        [binary, *arguments, f"--allow-gpu-metrics={str(use_gpu).lower()}"],
        # This installation's own environment finds its libraries (CUDA, TensorRT), so it is kept whole.
        environment=dict(os.environ),
        ports=ports,
        log_path=log_path,
        ready_timeout_seconds=ready_timeout_seconds,
    )
