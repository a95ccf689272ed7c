"""A Triton endpoint as a runner: images in, detections out, over gRPC. No torch.

Everything about the model (canvas, classes, thresholds) is read from the served configuration, so the client needs the
endpoint's address and the model's name only. Message sizes are not limited here: tritonclient allows 2 GiB.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

from export.signature import Detections, DetectorSignature, detections_from_outputs
from serving.model_statistics import ModelStatistics
from serving.preprocessing import canvas_from_image, detections_in_image, read_image

_UNREACHABLE = {"StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"}


class ServerUnreachable(ConnectionError):
    """No server answers at the address, or not in time."""

    exit_code = 4


class RequestRefused(ValueError):
    """The server answered and refused: a model it does not serve, or an input that is not what the model takes."""

    exit_code = 2


class TritonRunner:
    """Runs a served detector; implements the runner protocol.

    Safe to use from several threads. Also a context manager.

    Attributes:
        name: what tables call it.
        signature: as the server's model configuration says.
        provenance: what the publisher recorded about the model's origin.
    """

    name = "Triton"

    def __init__(
        self,
        url: str,
        model_name: str,
        version: str = "",
        *,
        timeout_seconds: float = 60.0,
        connect_seconds: float = 10.0,
    ) -> None:
        """Connect and read the signature.

        Args:
            url: host:port of the gRPC endpoint.
            version: a model version; empty for the one the server's version policy chooses.
            timeout_seconds: deadline of a request.
            connect_seconds: deadline of reading the configuration.

        Raises:
            ServerUnreachable: nothing answers there.
            RequestRefused: the model is not served, or was not published by this project.
        """
        self.url, self.model_name, self.version = url, model_name, version
        self._timeout_seconds = timeout_seconds
        self._client = triton.InferenceServerClient(url)
        try:
            parameters = self._served_parameters(connect_seconds)
            self.signature = DetectorSignature.from_json(parameters["signature"])
            self.provenance: dict[str, Any] = json.loads(parameters.get("provenance", "{}"))
            self._outputs = [triton.InferRequestedOutput(name) for name in self.signature.output_names]
        except KeyError:
            self.close()
            raise RequestRefused(
                f"model {model_name!r} at {url} has no 'signature' parameter in its configuration, so it was not "
                "published by this pipeline; publish it with the deploy stage"
            ) from None
        except BaseException:
            self.close()
            raise

    def _served_parameters(self, timeout_seconds: float) -> dict[str, str]:
        try:
            answer = self._client.get_model_config(self.model_name, self.version, client_timeout=timeout_seconds)
        except InferenceServerException as error:
            raise _translated(error, self.url, f"refused the request to model {self.model_name!r}") from error
        return {key: parameter.string_value for key, parameter in answer.config.parameters.items()}

    def run(self, images: np.ndarray) -> list[Detections]:
        """Detect on a batch of canvases.

        Args:
            images: (N, 3, H, W) uint8, N from 1 to the signature's ``max_batch_size``.

        Returns:
            N detections, boxes in canvas pixels.

        Raises:
            ValueError: ``images`` is not what the signature says.
            ServerUnreachable, RequestRefused: from the server.
        """
        self.signature.check_images(images)
        tensor = triton.InferInput(self.signature.input_name, list(images.shape), "UINT8")
        tensor.set_data_from_numpy(images)
        try:
            result = self._client.infer(
                self.model_name,
                [tensor],
                model_version=self.version,
                outputs=self._outputs,
                client_timeout=self._timeout_seconds,
            )
        except InferenceServerException as error:
            raise _translated(error, self.url, f"refused the request to model {self.model_name!r}") from error
        return detections_from_outputs({name: result.as_numpy(name) for name in self.signature.output_names})

    def statistics(self) -> ModelStatistics:
        """The server's cumulative counters of this model; subtract two readings for what lies between them."""
        try:
            answer = self._client.get_inference_statistics(
                self.model_name, self.version, client_timeout=self._timeout_seconds
            )
        except InferenceServerException as error:
            raise _translated(error, self.url, f"refused the request to model {self.model_name!r}") from error
        return ModelStatistics.from_answer(answer)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> TritonRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def detect_images(runner: TritonRunner, paths: Iterable[Path]) -> Iterator[tuple[Path, Detections]]:
    """Detect on image files, one request each; boxes in pixels of the upright original image.

    Raises:
        ImageError: a file that cannot be used, before anything of it is sent.
    """
    for path in paths:
        canvas, placement = canvas_from_image(read_image(path), runner.signature)
        (detections,) = runner.run(canvas[None])
        yield path, detections_in_image(detections, placement)


def load_model(url: str, model_name: str, *, timeout_seconds: float = 120.0) -> None:
    """Ask a running server under explicit model control to load a model's published versions; wait until it is ready.

    Raises:
        ServerUnreachable: nothing answers there.
        RequestRefused: the server cannot load the model, or does not let clients control models.
    """
    with triton.InferenceServerClient(url) as client:
        try:
            client.load_model(model_name, client_timeout=timeout_seconds)
            deadline = time.monotonic() + timeout_seconds
            # A load call can return before the model serves.
            while not client.is_model_ready(model_name, client_timeout=timeout_seconds):
                if time.monotonic() > deadline:
                    raise RequestRefused(
                        f"model {model_name!r} at {url} was not ready {timeout_seconds:.0f} s after loading"
                    )
                time.sleep(0.1)
        except InferenceServerException as error:
            raise _translated(error, url, f"could not load model {model_name!r}") from error


def check_reachable(url: str, *, timeout_seconds: float = 10.0) -> None:
    """Raises ``ServerUnreachable`` when no Triton server answers at the gRPC address."""
    with triton.InferenceServerClient(url) as client:
        try:
            client.is_server_live(client_timeout=timeout_seconds)
        except InferenceServerException as error:
            raise _translated(error, url, "did not say whether it is alive") from error


def served_models(url: str, *, timeout_seconds: float = 10.0) -> list[str]:
    """Names of the models that are ready at a server, sorted.

    Raises:
        ServerUnreachable: nothing answers there.
    """
    with triton.InferenceServerClient(url) as client:
        try:
            index = client.get_model_repository_index(client_timeout=timeout_seconds)
        except InferenceServerException as error:
            raise _translated(error, url, "could not list the models") from error
    return sorted({model.name for model in index.models if model.state == "READY"})


def run_concurrently(
    url: str,
    model_name: str,
    canvases: Iterable[np.ndarray],
    *,
    concurrency: int = 8,
    batch_sizes: Sequence[int] = (1, 2, 1, 3),
    timeout_seconds: float = 60.0,
) -> list[Detections]:
    """Detect with many requests of different sizes in flight, so that dynamic batching mixes images of all of them.

    Args:
        canvases: (3, H, W) uint8 each; read lazily, about ``2 * concurrency`` requests ahead.
        concurrency: requests in flight.
        batch_sizes: images of successive requests, repeated from the start; capped at the model's largest batch.

    Returns:
        One detections a canvas, in order.
    """
    detections: list[Detections] = []
    pending: deque[Future[list[Detections]]] = deque()
    with (
        TritonRunner(url, model_name, timeout_seconds=timeout_seconds) as runner,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        source, sizes = iter(canvases), cycle(min(size, runner.signature.max_batch_size) for size in batch_sizes)
        try:
            while batch := list(islice(source, next(sizes))):
                pending.append(pool.submit(runner.run, np.stack(batch)))
                if len(pending) >= 2 * concurrency:
                    detections += pending.popleft().result()
            while pending:
                detections += pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
    return detections


def _translated(error: InferenceServerException, url: str, what: str) -> Exception:
    if error.status() in _UNREACHABLE:
        return ServerUnreachable(
            f"no answer from a Triton server at {url} ({error.message()}); start one with `make serve`, or check the "
            "address given as --url or serving.url (host:port of the gRPC endpoint)"
        )
    # Triton appends the stack trace of a Python backend; it is in the server's log too.
    return RequestRefused(f"the server at {url} {what}: {error.message().splitlines()[0]}")
