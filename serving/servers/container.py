"""NVIDIA's Triton image under Docker, with Triton's own onnxruntime and tensorrt backends."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from serving.servers.running import LOOPBACK, Ports, RunningServer, ServerError, start_process, tritonserver_arguments

IMAGE = "nvcr.io/nvidia/tritonserver:26.07-py3"
"""Triton 2.71.0 with TensorRT 11.1; an engine loads only in the TensorRT version that built it."""

_TRITON_USER = 1000  # triton-server in NVIDIA's image
_PORTS_INSIDE = Ports(grpc=8001, http=8000, metrics=8002)


def container_command(repository: Path, model_names: Sequence[str], ports: Ports, gpu: bool) -> list[str]:
    """The ``docker run`` line: loopback ports, read-only repository, neither root nor capabilities."""
    user = f"{os.getuid()}:{os.getgid()}" if os.getuid() else f"{_TRITON_USER}:{_TRITON_USER}"
    published = [
        f"--publish={LOOPBACK}:{outside}:{inside}"
        for outside, inside in (
            (ports.grpc, _PORTS_INSIDE.grpc),
            (ports.http, _PORTS_INSIDE.http),
            (ports.metrics, _PORTS_INSIDE.metrics),
        )
    ]
    return [
        "docker",
        "run",
        "--rm",
        "--init",
        *(["--gpus=all"] if gpu else []),
        f"--user={user}",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--shm-size=1g",
        *published,
        f"--mount=type=bind,source={repository.resolve()},target=/models,readonly",
        IMAGE,
        "tritonserver",
        # Inside its network namespace it has to listen on all addresses; outside, Docker publishes on loopback only.
        *tritonserver_arguments("/models", model_names, _PORTS_INSIDE, "0.0.0.0"),
    ]


def check() -> None:
    """Raises ``ServerError`` when no Docker engine answers."""
    reason = docker_engine_missing()
    if reason is not None:
        raise ServerError(
            f"serving.server=container: never executed here: no Docker engine answered ({reason}). Start Docker, or "
            "use serving.server=wheel; the docker run line for another machine is in the report"
        )


def docker_engine_missing() -> str | None:
    """Why no container can run here, or None when a Docker engine answers."""
    if shutil.which("docker") is None:
        return "no docker command on PATH"
    try:
        answer = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "docker version did not answer in 20 s"
    return None if answer.returncode == 0 else " ".join(answer.stderr.split())


def start(
    repository: Path,
    model_names: Sequence[str],
    *,
    ports: Ports = Ports(),  # noqa: B008 (frozen)
    log_path: Path,
    use_gpu: bool = False,
    ready_timeout_seconds: float = 120.0,
) -> RunningServer:
    """Serve models of a repository from a container; arguments as of ``servers.wheel.start``."""
    check()
    ports = ports.reserve()
    command = container_command(repository, model_names, ports, use_gpu)
    try:
        return start_process(
            command,
            environment=dict(os.environ),  # Docker's own settings: DOCKER_HOST, its context, its credentials
            ports=ports,
            log_path=log_path,
            ready_timeout_seconds=ready_timeout_seconds,
        )
    except ServerError as error:
        raise ServerError(f"{error} The command was: {shlex.join(command)}") from error
