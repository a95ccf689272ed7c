"""The engine in Triton's Python backend, in a real server: on a stand-in GPU, and refused with our words."""

from __future__ import annotations

import concurrent.futures
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from export.signature import DetectorSignature
from serving.client import TritonRunner
from serving.model_config import DynamicBatching
from serving.model_repository import publish
from serving.servers import SERVERS, ServerError
from tests.serving.pixel_means import (
    assert_same_detections,
    expected_detections,
    needs_tritonserver,
    random_images,
)
from tests.stand_in_engine import STAND_IN_GPU, write_engine, write_record

pytestmark = [pytest.mark.server, needs_tritonserver, pytest.mark.timeout(180)]


def published(repository: Path, plan: Path, signature: DetectorSignature) -> Path:
    """The version; of a CPU instance, since Triton itself asks for the GPU of a GPU instance."""
    publish(
        repository,
        model_name="m",
        model_file=plan,
        signature=signature,
        backend="python_tensorrt",
        provenance={},
        dynamic_batching=DynamicBatching(max_queue_delay_microseconds=20_000),
    )
    return repository / "m" / "1"


def test_requests_are_batched_filled_up_and_given_back_to_their_clients(
    tmp_path: Path, model_file: Path, signature: DetectorSignature
) -> None:
    plan = write_engine(tmp_path / "engine", model_file, (3, 8, 8))
    version = published(tmp_path / "repository", plan, signature)
    for module in STAND_IN_GPU.glob("*.py"):
        shutil.copy(module, version)  # Triton puts this folder on the path
    images = random_images(24)
    with SERVERS["wheel"].start(tmp_path / "repository", ["m"], log_path=tmp_path / "log") as server:

        def detected(index: int) -> Any:
            with TritonRunner(server.grpc_url, "m") as runner:
                return runner.run(images[index : index + 1 + index % 2])

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(detected, range(23)))
    for index, found in enumerate(answers):
        assert len(found) == 1 + index % 2
        for detections, image in zip(found, images[index:], strict=False):
            assert_same_detections(detections, expected_detections(image))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1.0"}, "built with tensorrt_rtx 1.0, found tensorrt_rtx "),
        ({"library": "tensorrt_dispatch"}, "built with tensorrt_dispatch .*, which cannot be imported here"),
        ({"size_bytes": 5}, "model.plan has 4 bytes, expected 5"),
        ({}, "no NVIDIA GPU 0 that CUDA can use"),
    ],
)
def test_the_servers_error_says_why_an_engine_does_not_load(
    changes: dict[str, Any], message: str, tmp_path: Path, signature: DetectorSignature
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    if not changes and torch.cuda.is_available():
        pytest.skip("there is an NVIDIA GPU")
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"plan")
    facts = {"library": "tensorrt_rtx", "version": trt.__version__, "gpu": "", "compute_capabilities": ("75",)}
    write_record(plan, **(facts | changes))
    published(tmp_path / "repository", plan, signature)
    with pytest.raises(ServerError, match=message):
        SERVERS["wheel"].start(tmp_path / "repository", ["m"], log_path=tmp_path / "log")
