"""The recipe's ``serving`` and ``benchmark`` sections."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from serving.model_config import ENGINE_BACKENDS, MODEL_FILE_OF_BACKEND, OWN_BACKENDS, check_model_name
from serving.servers import SERVERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """How the model is published and served.

    Attributes:
        model_name: in the repository; ``<dataset>_<architecture>_<size>_<precision>``, no dots. A precision at its end
            gives way to the one that is served.
        device: where the model runs; "auto" takes the first GPU where there is one.
        server: "wheel" (tritonserver from pip, loopback), "path" (tritonserver on PATH) or "container" (Docker).
        url: host:port of the gRPC endpoint of a server that already runs and serves ``repository`` under explicit model
            control; ``server`` is not started then.
        repository: the model repository; None is one inside the run.
        backend: "python" (ONNX Runtime in Triton's Python backend), "python_tensorrt" (the engine, in the same),
            "onnxruntime" or "tensorrt" (Triton's own); None takes the one the server has: python for the wheel and for
            a url, onnxruntime otherwise.
        max_queue_delay_microseconds: how long a request may wait to be batched with others.
        max_queue_size: requests waiting above which new ones are refused; 0 is no limit.
        queue_timeout_microseconds: waiting time after which a request is refused; 0 is none.
        num_instances: execution instances of the model. With one, the dynamic batcher of Triton 2.51 can miss a wake-up
            and leave a request waiting for half a second (seen in 1 to 3 % of closed-loop requests).
        num_threads: threads of each instance's ONNX Runtime session; None leaves it to ONNX Runtime.
        allow_spinning: whether idle ONNX Runtime threads spin; they take cores from a client on the same machine.
        grpc_port, http_port, metrics_port: on the loopback interface; 0 is a free one.
        ready_timeout_seconds: how long loading the model may take.
        request_timeout_seconds: deadline of one request.
    """

    model_name: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    server: str = "wheel"
    url: str | None = None
    repository: str | None = None
    backend: str | None = None
    max_queue_delay_microseconds: int = 0
    max_queue_size: int = 512
    queue_timeout_microseconds: int = 0
    num_instances: int = 2
    num_threads: int | None = None
    allow_spinning: bool = False
    grpc_port: int = 0
    http_port: int = 0
    metrics_port: int = 0
    ready_timeout_seconds: float = 120.0
    request_timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        check_model_name("serving.model_name", self.model_name)
        _expect_one_of("serving.device", self.device, ("auto", "cpu", "cuda"))
        _expect_one_of("serving.server", self.server, tuple(SERVERS))
        if self.url is not None and self.repository is None:
            raise ValueError(
                f"serving.url={self.url} names a server that already runs, so serving.repository must name the model "
                "repository it reads; give serving.repository=/path/to/its/repository"
            )
        if self.backend is not None:
            _expect_one_of("serving.backend", self.backend, tuple(MODEL_FILE_OF_BACKEND))
        if self.server == "wheel" and self.url is None and self.backend not in (None, *OWN_BACKENDS):
            raise ValueError(
                f"serving.backend is {self.backend!r} but the wheel's server has the python backend only; "
                f"set serving.server=container or serving.server=path, or serving.backend={' or '.join(OWN_BACKENDS)}"
            )
        if self.serves_engine and self.device == "cpu":
            raise ValueError(f"serving.backend is {self.backend!r}, which needs a GPU, but serving.device is 'cpu'")
        for name in ("max_queue_delay_microseconds", "max_queue_size", "queue_timeout_microseconds"):
            _expect_at_least(f"serving.{name}", getattr(self, name), 0)
        _expect_at_least("serving.num_instances", self.num_instances, 1)
        if self.num_threads is not None:
            _expect_at_least("serving.num_threads", self.num_threads, 1)
        for name in ("grpc_port", "http_port", "metrics_port"):
            port = getattr(self, name)
            if not 0 <= port <= 65535:
                raise ValueError(f"serving.{name} is {port}, expected 0 (a free port) to 65535")
        for name in ("ready_timeout_seconds", "request_timeout_seconds"):
            _expect_above_zero(f"serving.{name}", getattr(self, name))

    @property
    def serves_engine(self) -> bool:
        """Whether the engine is what is published, and not an ONNX file."""
        return self.backend in ENGINE_BACKENDS

    @property
    def backend_of_server(self) -> str:
        """``backend``, or the one the server has where the recipe leaves it open."""
        if self.backend is not None:
            return self.backend
        return "python" if self.server == "wheel" or self.url is not None else "onnxruntime"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """How the endpoint is measured.

    Attributes:
        concurrencies: requests in flight of each closed-loop point; 1 is always among them and comes first, since the
            objective and the serving overhead refer to it.
        request_rates: requests a second of each open-loop point; none takes half and four fifths of the best
            closed-loop throughput, which fits any machine.
        seconds_per_point: measured time of a point.
        warmup_requests: requests before each point that are not measured.
        num_images: real validation images that are sent in turn, one a request.
        max_p99_ms: the latency objective, p99 at concurrency 1; None asks for none.
        seed: of the open loop's arrival times.
    """

    concurrencies: tuple[int, ...] = (1, 2, 4, 8)
    request_rates: tuple[float, ...] = ()
    seconds_per_point: float = 8.0
    warmup_requests: int = 10
    num_images: int = 64
    max_p99_ms: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # Overrides arrive as OmegaConf lists.
        object.__setattr__(self, "concurrencies", tuple(int(c) for c in self.concurrencies))
        object.__setattr__(self, "request_rates", tuple(float(rate) for rate in self.request_rates))
        _expect_at_least("benchmark.concurrencies: their number", len(self.concurrencies), 1)
        for concurrency in self.concurrencies:
            _expect_at_least("benchmark.concurrencies: an entry", concurrency, 1)
        object.__setattr__(self, "concurrencies", tuple(dict.fromkeys((1, *self.concurrencies))))
        for rate in self.request_rates:
            _expect_above_zero("benchmark.request_rates: an entry", rate)
        _expect_above_zero("benchmark.seconds_per_point", self.seconds_per_point)
        _expect_at_least("benchmark.warmup_requests", self.warmup_requests, 0)
        _expect_at_least("benchmark.num_images", self.num_images, 1)
        if self.max_p99_ms is not None:
            _expect_above_zero("benchmark.max_p99_ms", self.max_p99_ms)

    def rates_for(self, best_throughput: float) -> tuple[float, ...]:
        """``request_rates``, or half and four fifths of the closed loop's best throughput (requests a second)."""
        return self.request_rates or (0.5 * best_throughput, 0.8 * best_throughput)


def _expect_one_of(name: str, found: str, allowed: Sequence[str]) -> None:
    if found not in allowed:
        raise ValueError(f"{name} is {found!r}, expected one of {', '.join(allowed)}")


def _expect_at_least(name: str, found: int, least: int) -> None:
    if found < least:
        raise ValueError(f"{name} is {found}, expected at least {least}")


def _expect_above_zero(name: str, found: float) -> None:
    if not found > 0:
        raise ValueError(f"{name} is {found}, expected a number above 0")
