"""The live endpoint of a run: the repository it is served from and the server behind it."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.config import NmsChoice
from export.signature import DetectorSignature
from pipeline import environment
from pipeline.artifact import Artifact, open_artifact
from pipeline.errors import ArtifactError, RecipeError, Unavailable
from serving.client import TritonRunner, load_model
from serving.config import ServingConfig
from serving.model_config import ENGINE_BACKENDS, OWN_BACKENDS, DynamicBatching, InstanceGroup
from serving.model_repository import (
    RepositoryDamaged,
    ServedVersion,
    publish,
    serve_again,
    verify,
    verify_config,
    versions,
)
from serving.servers import SERVERS, Ports, ServerError
from serving.servers.container import container_command, docker_engine_missing

REPOSITORY = "model_repository"
_NOT_ON_CPU = {"bf16": "has no bfloat16 kernels", "fp8": "only emulates fp8, many times slower than float32,"}
DEFAULT_PORTS = Ports(grpc=8001, http=8000, metrics=8002)


def repository_of(config: ServingConfig, run_dir: Path) -> Path:
    """The model repository that a run publishes to."""
    return Path(config.repository) if config.repository else run_dir / REPOSITORY


def check_server(config: ServingConfig) -> None:
    """Check that the recipe's server can start here; cheap. One at ``serving.url``, or one that never runs here since
    there is no Docker engine, is nothing of this machine.

    Raises:
        ServerError: this machine lacks something.
    """
    if config.url is not None or not_executable(config) is not None:
        return
    SERVERS[config.server].check()
    if environment.facts()["gpus"]:
        return
    reason = environment.facts()["gpu_reason"]
    if config.serves_engine:
        raise ServerError(
            f"serving.backend={config.backend} runs the engine, which needs a GPU, but there is {reason}; serve on a "
            "machine with one, or the ONNX model, without serving.backend"
        )
    if config.device == "cuda":
        raise ServerError(
            f"serving.device=cuda asks for a GPU, but there is {reason}; set serving.device=cpu, or auto to use a GPU "
            "where there is one"
        )


def check_serves_nms(nms: NmsChoice, config: ServingConfig) -> None:
    """Check that a model whose NMS is outside goes where something does it.

    Raises:
        RecipeError: it goes to a backend that runs the file alone.
    """
    if nms == "outside" and config.backend_of_server not in OWN_BACKENDS:
        raise RecipeError(
            f"export.nms=outside ends the model at candidates and serving.backend={config.backend_of_server} runs the "
            "model alone; set serving.backend=python or python_tensorrt, which do the rest, or export.nms=portable"
        )


def check_serves_batches(min_batch_size: int, config: ServingConfig) -> None:
    """Check that an engine that takes no single images goes where smaller batches are filled up.

    Raises:
        RecipeError: Triton's own backend would refuse them, request by request.
    """
    if min_batch_size > 1 and config.backend == "tensorrt":
        raise RecipeError(
            f"export.min_batch_size={min_batch_size} makes an engine without smaller batches, and "
            "serving.backend=tensorrt gives it the requests as they come; set serving.backend=python_tensorrt, which "
            "fills them up, or export.min_batch_size=1"
        )


def check_served_precision(precision: str, config: ServingConfig) -> None:
    """Check that what serves the recipe's ONNX file computes in its precision.

    Raises:
        Unavailable: only a GPU does.
    """
    reason = _NOT_ON_CPU.get(precision)
    if reason is None or config.serves_engine or uses_gpu(config):
        return
    raise Unavailable(
        f"export.precision={precision} is to be served on a CPU, but ONNX Runtime {reason} there. Serve on a machine "
        "with a GPU, or the engine (serving.backend=python_tensorrt), or set export.precision to fp32, fp16 or int8; "
        "--until validate makes and measures the files without serving them"
    )


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
        instance_group=instance_group(config, config.backend_of_server),
        dynamic_batching=dynamic_batching(config),
        num_threads=config.num_threads or 0,
        allow_spinning=config.allow_spinning,
    )


def instance_group(config: ServingConfig, backend: str) -> InstanceGroup:
    """Where the model runs; engines have GPUs only."""
    if uses_gpu(config) or backend in ENGINE_BACKENDS:
        return InstanceGroup(kind="GPU", count=config.num_instances, gpus=(0,))
    return InstanceGroup(kind="CPU", count=config.num_instances)


def uses_gpu(config: ServingConfig) -> bool:
    """What ``serving.device`` comes to on this machine."""
    return config.device == "cuda" or (config.device == "auto" and bool(environment.facts()["gpus"]))


def dynamic_batching(config: ServingConfig) -> DynamicBatching:
    return DynamicBatching(
        max_queue_delay_microseconds=config.max_queue_delay_microseconds,
        max_queue_size=config.max_queue_size,
        default_timeout_microseconds=config.queue_timeout_microseconds,
    )


def not_executable(config: ServingConfig) -> str | None:
    """Why the recipe's server cannot run here; None when it can."""
    if config.url is not None or config.server != "container":
        return None
    missing = docker_engine_missing()
    return None if missing is None else f"never executed here: no Docker engine answered ({missing})"


def docker_line(config: ServingConfig, repository: Path) -> str:
    """The exact ``docker run`` line that serves the repository in NVIDIA's image."""
    return shlex.join(container_command(repository, [config.model_name], DEFAULT_PORTS, uses_gpu(config)))


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
        use_gpu=uses_gpu(config),
        ready_timeout_seconds=config.ready_timeout_seconds,
    ) as server:
        yield server.grpc_url


def serve_previous(config: ServingConfig, repository: Path, previous: ServedVersion) -> None:
    """Have an earlier version served again, by the running server at once and by the next one that starts."""
    serve_again(repository, previous)
    if config.url is not None:
        load_model(config.url, config.model_name, timeout_seconds=config.ready_timeout_seconds)


def runner_of(config: ServingConfig, url: str) -> TritonRunner:
    return TritonRunner(url, config.model_name, timeout_seconds=config.request_timeout_seconds)


def deployed(run_dir: Path) -> Artifact:
    """The verified deploy artifact of a run, with what it published verified too.

    Raises:
        ArtifactError: nothing was deployed, or the artifact is damaged.
        RepositoryDamaged: the version published, the one served in its place or the configuration was changed.
    """
    if not (run_dir / "deploy").is_dir():
        raise ArtifactError(
            f"artifact missing: {run_dir / 'deploy'} is not there, so nothing was deployed; run "
            "`make train-export-deploy` first, or name another run with --name"
        )
    artifact = open_artifact(run_dir / "deploy")
    facts = artifact.manifest.facts
    repository, name = repository_path(facts, run_dir), facts["model_name"]
    try:
        for version in sorted({facts["version"], served_version_of(facts)}):
            verify(repository / name / str(version))
        # A newer version is another run's in a shared repository, and so is the configuration then.
        if max(versions(repository, name)) == facts["version"]:
            verify_config(repository, name, facts["config_digest"])
    except RepositoryDamaged as error:
        command = artifact.manifest.command.removesuffix(" --until deploy")
        raise RepositoryDamaged(
            f"{error}. Publish the model anew, which leaves damaged versions as they are: {command} --from deploy "
            "--force"
        ) from error
    return artifact


def served_version_of(facts: dict[str, Any]) -> int:
    """The version that a server serves after the deployment that the facts describe."""
    return facts["rolled_back_to"] or facts["version"]


def repository_path(facts: dict[str, Any], run_dir: Path) -> Path:
    """The repository that deploy facts name; one inside the run is named by the run's folder."""
    return Path(facts["repository"]) if facts["repository"] else run_dir / REPOSITORY
