"""Latency and throughput of a served detector under load, over gRPC, beside the same model in process.

Two scenarios: *closed loop* keeps a number of requests in flight, each thread sending its next when the last is
answered; *open loop* sends at times drawn beforehand (Poisson), whether or not the server keeps up, and counts latency
from the scheduled time, so that a slow answer cannot hide the wait of those behind it (coordinated omission).

The client shares the machine with the server, so it is kept light: requests are serialised once and sent as bytes. On
two cores that took 0.2 ms of processor time a request. Blocking calls in threads serve the closed loop, since they gave
the lowest latency at concurrency 1 (p50 0.53 ms for a tiny model, against 0.60 with futures and 0.75 with asyncio).

Knows nothing of AP: what is right is shown elsewhere, through the same endpoint.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from serving.client import RequestRefused, ServerUnreachable, TritonRunner
from serving.model_statistics import ModelStatistics

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
# tritonclient's own limits; gRPC's default of 4 MiB is one batch of canvases.
_CHANNEL_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_PAUSE_AFTER_FAILURE_SECONDS = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadResult:
    """What one point of load measured.

    Attributes:
        latencies_seconds: one a successful request, in the order they ended.
        elapsed_seconds: from the first request to the last answer.
        failures: number of failed requests by the server's message.
        statistics: what the server counted meanwhile; None in process.
    """

    latencies_seconds: np.ndarray
    elapsed_seconds: float
    failures: Counter[str]
    statistics: ModelStatistics | None

    @property
    def throughput(self) -> float:
        """Images a second (a request is one image)."""
        return len(self.latencies_seconds) / self.elapsed_seconds

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.latencies_seconds, percent) * 1e3)

    def facts(self) -> dict[str, float]:
        """The numbers of a report row: percentiles, throughput and, for a server, where the mean latency went."""
        facts: dict[str, float] = {
            "throughput": self.throughput,
            **{f"p{percent}_ms": self.percentile_ms(percent) for percent in (50, 90, 95, 99)},
            "num_requests": len(self.latencies_seconds),
            "num_failures": sum(self.failures.values()),
        }
        if self.statistics is not None:
            server = self.statistics.milliseconds_per_request()
            mean_ms = float(self.latencies_seconds.mean() * 1e3)
            # What is left: the client, the transport and the server's handling of them.
            facts |= server | {"client_ms": max(mean_ms - sum(server.values()), 0.0)}
            facts["mean_batch_size"] = self.statistics.mean_batch_size
        return facts


def closed_loop(
    url: str,
    model_name: str,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    concurrency: int,
    seconds: float,
    warmup_requests: int = 10,
    timeout_seconds: float = 60.0,
) -> LoadResult:
    """Keep ``concurrency`` requests of one image in flight for ``seconds``.

    Args:
        images: (3, H, W) uint8 canvases, sent in turn.
        warmup_requests: sent before, at the same concurrency, and not measured.

    Raises:
        ServerUnreachable, RequestRefused: no request succeeded.
    """
    with TritonRunner(url, model_name, timeout_seconds=timeout_seconds) as runner, _infer_call(url) as infer:
        requests = _serialized(model_name, runner.signature.input_name, images)

        def load(deadline: float, limit: float) -> tuple[list[float], Counter[str]]:
            latencies: list[float] = []
            failures: Counter[str] = Counter()
            turns = itertools.count()

            def client() -> None:
                while (turn := next(turns)) < limit and time.perf_counter() < deadline:
                    start = time.perf_counter()
                    try:
                        infer(requests[turn % len(requests)], timeout=timeout_seconds)
                        latencies.append(time.perf_counter() - start)
                    except grpc.RpcError as error:
                        failures[_message(error)] += 1
                        time.sleep(_PAUSE_AFTER_FAILURE_SECONDS)

            threads = [threading.Thread(target=client, daemon=True) for _ in range(concurrency)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return latencies, failures

        load(deadline=time.perf_counter() + timeout_seconds, limit=warmup_requests)
        before, start = runner.statistics(), time.perf_counter()
        latencies, failures = load(deadline=start + seconds, limit=float("inf"))
        elapsed = time.perf_counter() - start
        return _checked(url, model_name, latencies, elapsed, failures, runner.statistics() - before)


def open_loop(
    url: str,
    model_name: str,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    request_rate: float,
    seconds: float,
    seed: int = 0,
    warmup_requests: int = 10,
    timeout_seconds: float = 60.0,
) -> LoadResult:
    """Send requests of one image at Poisson-distributed times and count latency from the time each was due.

    Args:
        images: (3, H, W) uint8 canvases, sent in turn.
        request_rate: mean requests a second.
        seconds: the time over which they are due; the answers are waited for after it.
        seed: of the times.

    Raises:
        ServerUnreachable, RequestRefused: no request succeeded.
    """
    due = arrival_times(request_rate, seconds, seed)
    ended: list[float] = []
    latencies: list[float] = []
    failures: Counter[str] = Counter()
    outstanding = threading.Semaphore(0)

    def on_answer(call: grpc.Future, due_at: float) -> None:
        now = time.perf_counter()
        error = call.exception()
        if error is None:
            latencies.append(now - due_at)
        else:
            failures[_message(error)] += 1
        ended.append(now)
        outstanding.release()

    with TritonRunner(url, model_name, timeout_seconds=timeout_seconds) as runner, _infer_call(url) as infer:
        requests = _serialized(model_name, runner.signature.input_name, images)
        for turn in range(warmup_requests):
            infer(requests[turn % len(requests)], timeout=timeout_seconds)
        before, start = runner.statistics(), time.perf_counter()
        for turn, offset in enumerate(due):
            due_at = start + offset
            time.sleep(max(due_at - time.perf_counter(), 0.0))
            call = infer.future(requests[turn % len(requests)], timeout=timeout_seconds)
            call.add_done_callback(lambda call, due_at=due_at: on_answer(call, due_at))
        for _ in due:
            outstanding.acquire()
        return _checked(url, model_name, latencies, max(ended) - start, failures, runner.statistics() - before)


def arrival_times(request_rate: float, seconds: float, seed: int) -> list[float]:
    """Poisson arrivals in [0, seconds), at least one; the same for the same seed."""
    generator = np.random.default_rng(seed)
    # Six standard deviations above the mean number, so that the last one lies past the end.
    num = int(request_rate * seconds + 6 * np.sqrt(request_rate * seconds)) + 10
    times = np.cumsum(generator.exponential(1 / request_rate, num))
    return times[: max(int(np.searchsorted(times, seconds)), 1)].tolist()


def measure_in_process(
    run_one: Callable[[np.ndarray], object],
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    seconds: float,
    warmup_requests: int = 10,
) -> LoadResult:
    """Latency of calling a runner directly, one (1, 3, H, W) batch after another: the closed loop without a server."""
    for turn in range(warmup_requests):
        run_one(images[turn % len(images)][None])
    latencies = []
    start = time.perf_counter()
    for turn in itertools.count():
        before = time.perf_counter()
        run_one(images[turn % len(images)][None])
        after = time.perf_counter()
        latencies.append(after - before)
        if after - start >= seconds:
            break
    return LoadResult(
        latencies_seconds=np.array(latencies),
        elapsed_seconds=time.perf_counter() - start,
        failures=Counter(),
        statistics=None,
    )


def _serialized(model_name: str, input_name: str, images: Sequence[np.ndarray] | np.ndarray) -> list[bytes]:
    """One request of batch 1 an image, as it goes over the wire."""
    requests = []
    for image in images:
        tensor = service_pb2.ModelInferRequest.InferInputTensor(
            name=input_name, datatype="UINT8", shape=(1, *image.shape)
        )
        content = np.ascontiguousarray(image).tobytes()
        request = service_pb2.ModelInferRequest(model_name=model_name, inputs=[tensor], raw_input_contents=[content])
        requests.append(request.SerializeToString())
    return requests


@contextmanager
def _infer_call(url: str) -> Iterator[grpc.UnaryUnaryMultiCallable]:
    with grpc.insecure_channel(url, options=_CHANNEL_OPTIONS) as channel:
        yield channel.unary_unary(_METHOD, response_deserializer=service_pb2.ModelInferResponse.FromString)


def _message(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}"


def _checked(
    url: str,
    model_name: str,
    latencies: list[float],
    elapsed_seconds: float,
    failures: Counter[str],
    statistics: ModelStatistics,
) -> LoadResult:
    if not latencies:
        message = failures.most_common(1)[0][0]
        kind = ServerUnreachable if message.startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED")) else RequestRefused
        raise kind(f"no request to model {model_name!r} at {url} succeeded: {message}")
    return LoadResult(
        latencies_seconds=np.array(latencies), elapsed_seconds=elapsed_seconds, failures=failures, statistics=statistics
    )
