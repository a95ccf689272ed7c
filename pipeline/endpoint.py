"""The live endpoint of a run: the repository it is served from and the server behind it."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.signature import DetectorSignature
from pipeline import environment
from pipeline.artifact import Artifact, open_artifact
from pipeline.errors import ArtifactError, RecipeError
from serving.client import TritonRunner, load_model
from serving.config import ServingConfig
from serving.model_config import DynamicBatching, InstanceGroup
from serving.model_repository import publish, verify
from serving.servers import SERVERS, Ports
from serving.servers.container import container_command, docker_engine_missing

REPOSITORY = "model_repository"
DEFAULT_PORTS = Ports(grpc=8001, http=8000, metrics=8002)


def repository_of(config: ServingConfig, run_dir: Path) -> Path:
    """The model repository that a run publishes to."""
    if config.url is not None and config.repository is None:
        raise RecipeError(
            f"serving.url={config.url} names a server that already runs, so serving.repository must name the model "
            "repository it reads; give serving.repository=/path/to/its/repository"
        )
    return Path(config.repository) if config.repository else run_dir / REPOSITORY


def publish_version(
    config: ServingConfig, repository: Path, model_file: Path, signature: DetectorSignature, provenance: dict[str, Any]
) -> int:
    """Publish ``model_file`` as the recipe's ``serving`` section says; returns the version."""
    return publish(
        repository,
        model_name=config.model_name,
        model_file=model_file,
        signature=signature,
        backend=config.backend_of_server,  # type: ignore[arg-type]  # ServingConfig has checked it
        provenance=provenance,
        instance_group=InstanceGroup(kind="GPU" if has_gpu() else "CPU", count=config.num_instances),
        dynamic_batching=dynamic_batching(config),
        num_threads=config.num_threads or 0,
        allow_spinning=config.allow_spinning,
    )


def dynamic_batching(config: ServingConfig) -> DynamicBatching:
    return DynamicBatching(
        max_queue_delay_microseconds=config.max_queue_delay_microseconds,
        max_queue_size=config.max_queue_size,
        default_timeout_microseconds=config.queue_timeout_microseconds,
    )


def has_gpu() -> bool:
    return bool(environment.facts()["gpus"])


def not_executable(config: ServingConfig) -> str | None:
    """Why the recipe's server cannot run here; None when it can."""
    if config.url is not None or config.server != "container":
        return None
    missing = docker_engine_missing()
    return None if missing is None else f"never executed here: no Docker engine answered ({missing})"


def docker_line(config: ServingConfig, repository: Path) -> str:
    """The exact ``docker run`` line that serves the repository in NVIDIA's image."""
    return shlex.join(container_command(repository, [config.model_name], DEFAULT_PORTS, has_gpu()))


@contextlib.contextmanager
def live_endpoint(config: ServingConfig, repository: Path, log_path: Path) -> Iterator[str]:
    """Start the recipe's server, or load the model into the one that runs; the value is the gRPC host:port."""
    if config.url is not None:
        load_model(config.url, config.model_name, timeout_seconds=config.ready_timeout_seconds)
        yield config.url
        return
    with SERVERS[config.server].start(
        repository,
        [config.model_name],
        ports=Ports(grpc=config.grpc_port, http=config.http_port, metrics=config.metrics_port),
        log_path=log_path,
        use_gpu=has_gpu(),
        ready_timeout_seconds=config.ready_timeout_seconds,
    ) as server:
        yield server.grpc_url


def runner_of(config: ServingConfig, url: str) -> TritonRunner:
    return TritonRunner(url, config.model_name, timeout_seconds=config.request_timeout_seconds)


def deployed(run_dir: Path) -> Artifact:
    """The verified deploy artifact of a run, its model version verified too."""
    if not (run_dir / "deploy").is_dir():
        raise ArtifactError(
            f"artifact missing: {run_dir / 'deploy'} is not there, so nothing was deployed; run "
            "`make train-export-deploy` first, or name another run with --name"
        )
    artifact = open_artifact(run_dir / "deploy")
    facts = artifact.manifest.facts
    verify(repository_path(facts, run_dir) / facts["model_name"] / str(facts["version"]))
    return artifact


def repository_path(facts: dict[str, Any], run_dir: Path) -> Path:
    """The repository that deploy facts name; one inside the run is named by the run's folder."""
    return Path(facts["repository"]) if facts["repository"] else run_dir / REPOSITORY
