"""Whether the server that a recipe asks for can run the run's engine; asked before anything is published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.engine_session import check_gpu, check_library, current_gpu, record_of
from pipeline.endpoint import not_executable
from pipeline.errors import Unavailable
from serving.config import ServingConfig


def check_engine_built(facts: Mapping[str, Any], config: ServingConfig) -> None:
    """Check that there is an engine and that the backend reads it.

    Triton's tensorrt backend reads engines of TensorRT, not those of TensorRT-RTX.

    Args:
        facts: of the engine stage.

    Raises:
        Unavailable: it was not built, or is of the other library.
    """
    if facts["status"] != "built":
        raise Unavailable(f"serving.backend={config.backend} serves the engine, which was not built: {facts['reason']}")
    if config.backend == "tensorrt" and facts["library"] != "tensorrt":
        raise Unavailable(
            f"serving.backend=tensorrt serves a TensorRT engine, but {facts['library']} {facts['version']} built this "
            "run's, which Triton's tensorrt backend cannot load. Install tensorrt, in the version of the server, "
            "and run again from the engine stage (--from engine), or set serving.backend=python_tensorrt"
        )


def check_engine_runs(plan_path: Path, config: ServingConfig) -> None:
    """Check that the engine is for the GPU of a server that starts here, and for the library where it is ours to load.

    Raises:
        EngineUnavailable: it is for another GPU or version; says what was found and expected.
        EngineDamaged: it is not the one that was built.
    """
    record = record_of(plan_path)
    if config.url is not None or not_executable(config) is not None:
        return
    if config.backend == "python_tensorrt" and config.server == "wheel":  # which has this Python's packages
        check_library(record)
    check_gpu(record, *current_gpu())
