"""The client against the real server: right answers in order, readable errors."""

from __future__ import annotations

import dataclasses
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

from export.signature import DetectorSignature
from serving.client import (
    RequestRefused,
    ServerUnreachable,
    TritonRunner,
    detect_images,
    load_model,
    run_concurrently,
    served_models,
)
from serving.model_repository import publish
from serving.preprocessing import ImageError
from serving.servers import RunningServer
from tests.serving.pixel_means import (
    MODEL_NAME,
    assert_same_detections,
    expected_detections,
    needs_tritonserver,
    random_images,
)

pytestmark = [pytest.mark.server, needs_tritonserver, pytest.mark.timeout(120)]


def raw_infer(server: RunningServer, name: str, array: np.ndarray, data_type: str) -> triton.InferResult:
    """A request by plain tritonclient, without this project's checks."""
    with triton.InferenceServerClient(server.grpc_url) as client:
        tensor = triton.InferInput(name, list(array.shape), data_type)
        tensor.set_data_from_numpy(array)
        return client.infer(MODEL_NAME, [tensor], client_timeout=20)


def test_the_signature_and_the_provenance_come_from_the_server(
    server: RunningServer, signature: DetectorSignature
) -> None:
    with TritonRunner(server.grpc_url, MODEL_NAME) as runner:
        assert runner.signature == signature
        assert runner.provenance == {"run": "tests"}


def test_every_batch_size_gives_each_image_its_own_detections(server: RunningServer) -> None:
    images = random_images(8)
    with TritonRunner(server.grpc_url, MODEL_NAME) as runner:
        for size in range(1, 9):
            found = runner.run(images[:size])
            assert len(found) == size
            for detections, image in zip(found, images, strict=False):
                assert_same_detections(detections, expected_detections(image))


def test_concurrent_requests_are_batched_together_and_answered_in_order(server: RunningServer) -> None:
    images = random_images(200, seed=1)
    with TritonRunner(server.grpc_url, MODEL_NAME) as runner:
        before = runner.statistics()
        found = run_concurrently(server.grpc_url, MODEL_NAME, iter(images), concurrency=8)
        delta = runner.statistics() - before
    assert len(found) == 200
    for detections, image in zip(found, images, strict=True):
        assert_same_detections(detections, expected_detections(image))
    mean_request_size = delta.num_images / delta.num_requests
    assert delta.num_images == 200
    assert delta.num_failures == 0
    # Larger than the requests themselves: the server put images of different requests into one execution.
    assert delta.mean_batch_size > mean_request_size * 1.2


@pytest.mark.parametrize(
    ("name", "array", "data_type", "message"),
    [
        (
            "images",
            np.zeros((1, 3, 48, 63), np.uint8),
            "UINT8",
            r"Expected \[-1,3,48,64\], got \[1,3,48,63\]",
        ),
        ("images", np.zeros((1, 48, 64, 3), np.uint8), "UINT8", "unexpected shape"),
        ("images", np.zeros((3, 48, 64), np.uint8), "UINT8", "unexpected shape"),
        ("images", np.zeros((9, 3, 48, 64), np.uint8), "UINT8", "batch-size must be <= 8"),
        ("images", np.zeros((1, 3, 48, 64), np.float32), "FP32", "data-type"),
        ("pixels", np.zeros((1, 3, 48, 64), np.uint8), "UINT8", "unexpected inference input 'pixels'|missing.*images"),
    ],
)
def test_a_request_of_wrong_shape_dtype_or_name_is_refused_with_the_reason_and_the_server_serves_on(
    server: RunningServer, name: str, array: np.ndarray, data_type: str, message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message):
        raw_infer(server, name, array, data_type)
    images = random_images(1)
    with TritonRunner(server.grpc_url, MODEL_NAME) as runner:
        assert_same_detections(runner.run(images)[0], expected_detections(images[0]))


def test_an_empty_batch_is_refused_and_the_server_serves_on(server: RunningServer) -> None:
    with pytest.raises(InferenceServerException):
        raw_infer(server, "images", np.zeros((0, 3, 48, 64), np.uint8), "UINT8")
    with TritonRunner(server.grpc_url, MODEL_NAME) as runner:
        assert len(runner.run(random_images(1))) == 1


def test_wrong_requests_among_good_ones_do_not_harm_them(server: RunningServer) -> None:
    images = random_images(60, seed=2)

    def good(image: np.ndarray) -> None:
        assert_same_detections(runner.run(image[None])[0], expected_detections(image))

    def bad(_: int) -> None:
        with pytest.raises(InferenceServerException):
            raw_infer(server, "images", np.zeros((1, 3, 48, 63), np.uint8), "UINT8")

    with TritonRunner(server.grpc_url, MODEL_NAME) as runner, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(good, image) for image in images] + [pool.submit(bad, i) for i in range(20)]
        for answer in answers:
            answer.result()


def test_the_runner_checks_images_before_it_sends_them(server: RunningServer) -> None:
    with TritonRunner(server.grpc_url, MODEL_NAME) as runner:
        with pytest.raises(ValueError, match="found dtype float32, expected uint8"):
            runner.run(np.zeros((1, 3, 48, 64), np.float32))
        with pytest.raises(ValueError, match="found batch 9, expected 1 to 8"):
            runner.run(np.zeros((9, 3, 48, 64), np.uint8))


def test_the_servers_refusal_reaches_the_caller(server: RunningServer) -> None:
    with TritonRunner(server.grpc_url, MODEL_NAME) as runner:
        # As when another model was published under the name after this client had connected.
        runner.signature = dataclasses.replace(runner.signature, canvas_width=32)
        with pytest.raises(RequestRefused, match=rf"{server.grpc_url} refused .*'pixel_means': .*unexpected shape"):
            runner.run(np.zeros((1, 3, 48, 32), np.uint8))
    assert RequestRefused.exit_code == 2


def test_a_model_that_is_not_served_is_named(server: RunningServer) -> None:
    with pytest.raises(RequestRefused, match=r"refused .*'nonesuch': .*unknown model"):
        TritonRunner(server.grpc_url, "nonesuch")


def test_an_unreachable_server_is_said_soon_with_what_to_do() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{probe.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(ServerUnreachable, match=rf"no answer from a Triton server at {url} .*make serve"):
        TritonRunner(url, MODEL_NAME)
    assert time.monotonic() - start < 10
    assert ServerUnreachable.exit_code == 4


def test_a_server_that_accepts_and_never_answers_meets_the_deadline() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ServerUnreachable):
            TritonRunner(f"127.0.0.1:{silent.getsockname()[1]}", MODEL_NAME, connect_seconds=1.0)


def test_image_files_are_detected_in_their_own_pixels(server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "flat.png"
    color = (200, 120, 90)
    Image.new("RGB", (640, 480), color).save(path)  # ten times the canvas
    with TritonRunner(server.grpc_url, MODEL_NAME) as runner:
        ((found_path, detections),) = detect_images(runner, [path])
    assert found_path == path
    # The test model's second box is (0, 0, g, b) in canvas pixels; the image is 480 high.
    np.testing.assert_allclose(detections.boxes, [[0, 0, 640, 480], [0, 0, 640, 480]])
    np.testing.assert_allclose(detections.scores, [200 / 255, 120 / 255], rtol=1e-6)


def test_an_unusable_image_file_stops_before_anything_is_sent(server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.new("RGB", (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:300])
    with TritonRunner(server.grpc_url, MODEL_NAME) as runner:
        before = runner.statistics().num_requests
        with pytest.raises(ImageError, match=r"cut\.jpg"):
            list(detect_images(runner, [path]))
        assert runner.statistics().num_requests == before


def test_a_model_published_beside_a_running_server_is_loaded_on_request(
    server: RunningServer, repository: Path, model_file: Path, signature: DetectorSignature
) -> None:
    facts: dict[str, Any] = {"model_name": "late", "signature": signature, "backend": "python", "num_threads": 1}
    publish(repository, model_file=model_file, provenance={"run": "first"}, **facts)
    load_model(server.grpc_url, "late")
    images = random_images(2)
    with TritonRunner(server.grpc_url, "late") as runner:
        assert_same_detections(runner.run(images)[1], expected_detections(images[1]))
    assert publish(repository, model_file=model_file, provenance={"run": "second"}, **facts) == 2
    load_model(server.grpc_url, "late")
    with TritonRunner(server.grpc_url, "late") as runner:
        assert runner.provenance == {"run": "second"}


def test_a_published_model_that_cannot_be_loaded_is_refused_with_the_reason(
    server: RunningServer, repository: Path, model_file: Path, signature: DetectorSignature, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(model_file.read_bytes()[:-200])
    publish(repository, model_name="bad", model_file=broken, signature=signature, backend="python", provenance={})
    with pytest.raises(RequestRefused, match=r"could not load model 'bad'.*Protobuf parsing failed"):
        load_model(server.grpc_url, "bad")


def test_the_models_that_are_ready_are_listed(server: RunningServer) -> None:
    # Other tests load more on this server; one that could not be loaded is never listed.
    assert set(served_models(server.grpc_url)) - {"late"} == {MODEL_NAME}
    with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:9"):
        served_models("127.0.0.1:9", timeout_seconds=2.0)
