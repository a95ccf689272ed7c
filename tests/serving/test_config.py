"""Wrong values in the serving and benchmark sections are refused with the key, the value and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from serving.config import BenchmarkConfig, ServingConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": "whale"}, r"serving\.server is 'whale', expected one of wheel, path, container"),
        (
            {"backend": "torch"},
            r"serving\.backend is 'torch', expected one of python, python_tensorrt, onnxruntime",
        ),
        ({"backend": "tensorrt"}, r"the wheel's server has the python backend only"),
        (
            {"backend": "python_tensorrt", "device": "cpu"},
            r"needs a GPU, but serving\.device is 'cpu'",
        ),
        ({"model_name": "a.b"}, r"serving\.model_name is 'a\.b': only letters"),
        ({"model_name": ""}, r"serving\.model_name is ''"),
        ({"device": "gpu"}, r"serving\.device is 'gpu', expected one of auto, cpu, cuda"),
        ({"server": "path", "backend": "tensorrt", "device": "cpu"}, r"needs a GPU, but serving\.device is 'cpu'"),
        ({"url": "there:8001"}, r"serving\.url=there:8001 .*serving\.repository must name"),
        ({"num_instances": 0}, r"serving\.num_instances is 0, expected at least 1"),
        ({"num_threads": 0}, r"serving\.num_threads is 0, expected at least 1"),
        ({"max_queue_delay_microseconds": -1}, r"serving\.max_queue_delay_microseconds is -1"),
        ({"grpc_port": 70000}, r"serving\.grpc_port is 70000, expected 0 \(a free port\) to 65535"),
        ({"ready_timeout_seconds": 0}, r"serving\.ready_timeout_seconds is 0"),
    ],
)
def test_a_wrong_serving_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingConfig(**({"model_name": "m"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurrencies": ()}, r"benchmark\.concurrencies"),
        ({"concurrencies": (1, 0)}, r"benchmark\.concurrencies: an entry is 0, expected at least 1"),
        ({"request_rates": (0.0,)}, r"benchmark\.request_rates: an entry is 0\.0"),
        ({"seconds_per_point": 0}, r"benchmark\.seconds_per_point is 0"),
        ({"max_p99_ms": -1}, r"benchmark\.max_p99_ms is -1"),
    ],
)
def test_a_wrong_benchmark_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig(**changes)


def test_lists_from_the_command_line_become_tuples() -> None:
    config = BenchmarkConfig(concurrencies=[1, 2], request_rates=[5])  # type: ignore[arg-type]
    assert config == BenchmarkConfig(concurrencies=(1, 2), request_rates=(5.0,))


def test_concurrency_1_is_always_measured_and_comes_first() -> None:
    assert BenchmarkConfig(concurrencies=(8, 4, 8)).concurrencies == (1, 8, 4)
    assert BenchmarkConfig(concurrencies=(2, 1)).concurrencies == (1, 2)


def test_the_backend_follows_the_server_where_it_is_left_open() -> None:
    assert ServingConfig(model_name="m").backend_of_server == "python"
    assert ServingConfig(model_name="m", server="container").backend_of_server == "onnxruntime"
    assert ServingConfig(model_name="m", server="container", url="h:1", repository="/r").backend_of_server == "python"
    assert ServingConfig(model_name="m", server="path", backend="tensorrt").backend_of_server == "tensorrt"


def test_request_rates_follow_the_measured_throughput_where_none_are_given() -> None:
    assert BenchmarkConfig().rates_for(20.0) == (10.0, 16.0)
    assert BenchmarkConfig(request_rates=(3,)).rates_for(20.0) == (3.0,)
