"""One model repository and one real server for all tests that need them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from export.signature import DetectorSignature
from serving.model_config import DynamicBatching
from serving.model_repository import publish
from serving.servers import SERVERS, RunningServer
from tests.serving.pixel_means import MODEL_NAME, make_signature, write_pixel_means_model


@pytest.fixture(scope="session")
def signature() -> DetectorSignature:
    return make_signature()


@pytest.fixture(scope="session")
def model_file(signature: DetectorSignature, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixel_means_model(tmp_path_factory.mktemp("model") / "model.onnx", signature)


@pytest.fixture(scope="session")
def repository(signature: DetectorSignature, model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model_repository")
    publish(
        path,
        model_name=MODEL_NAME,
        model_file=model_file,
        signature=signature,
        backend="python",
        provenance={"run": "tests"},
        dynamic_batching=DynamicBatching(max_queue_delay_microseconds=2000),
        num_threads=1,
    )
    return path


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log_path = tmp_path_factory.mktemp("server") / "tritonserver.log"
    with SERVERS["wheel"].start(repository, [MODEL_NAME], log_path=log_path) as running:
        yield running
