"""Load on the real server: what is counted is what was sent, and waiting is not hidden."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from serving.client import RequestRefused, TritonRunner
from serving.load_generator import LoadResult, arrival_times, closed_loop, measure_in_process, open_loop
from serving.model_statistics import ModelStatistics
from serving.servers import RunningServer
from tests.serving.pixel_means import MODEL_NAME, needs_tritonserver, random_images

REPORT_KEYS = {"throughput", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "num_requests", "num_failures"}
SERVER_KEYS = {"mean_batch_size", "client_ms", "queue_ms", "compute_input_ms", "compute_infer_ms", "compute_output_ms"}


@pytest.mark.server
@needs_tritonserver
def test_the_closed_loop_counts_every_measured_request_as_the_server_does(server: RunningServer) -> None:
    result = closed_loop(server.grpc_url, MODEL_NAME, random_images(5), concurrency=4, seconds=1.0, warmup_requests=7)
    assert result.statistics is not None
    assert result.statistics.num_requests == len(result.latencies_seconds) > 20
    assert not result.failures
    assert 1.0 <= result.elapsed_seconds < 2.0
    facts = result.facts()
    assert facts.keys() == REPORT_KEYS | SERVER_KEYS
    assert facts["p50_ms"] <= facts["p90_ms"] <= facts["p95_ms"] <= facts["p99_ms"]
    split = sum(facts[key] for key in SERVER_KEYS - {"mean_batch_size"})
    assert split == pytest.approx(result.latencies_seconds.mean() * 1e3)
    # In a closed loop, requests in flight = throughput times latency (Little's law).
    assert facts["throughput"] * result.latencies_seconds.mean() == pytest.approx(4, rel=0.15)


@pytest.mark.server
@needs_tritonserver
def test_the_open_loop_sends_what_was_scheduled(server: RunningServer) -> None:
    result = open_loop(
        server.grpc_url, MODEL_NAME, random_images(5), request_rate=60, seconds=1.5, seed=3, warmup_requests=2
    )
    assert len(result.latencies_seconds) == len(arrival_times(60, 1.5, 3))
    assert result.statistics is not None
    assert result.statistics.num_requests == len(result.latencies_seconds)
    assert result.facts().keys() == REPORT_KEYS | SERVER_KEYS


@pytest.mark.server
@needs_tritonserver
def test_the_open_loop_counts_the_wait_of_requests_that_are_sent_late(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator that is held up must not hide it: latency counts from the time a request was due."""
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds + 0.15))
    result = open_loop(server.grpc_url, MODEL_NAME, random_images(2), request_rate=20, seconds=1.0, warmup_requests=1)
    assert result.percentile_ms(50) > 150


@pytest.mark.server
@needs_tritonserver
def test_a_load_of_wrong_requests_fails_with_the_servers_reason(server: RunningServer) -> None:
    wrong = np.zeros((1, 3, 48, 63), np.uint8)
    with pytest.raises(RequestRefused, match=r"no request to model 'pixel_means' .*unexpected shape"):
        closed_loop(server.grpc_url, MODEL_NAME, wrong, concurrency=2, seconds=0.3, warmup_requests=0)


@pytest.mark.server
@needs_tritonserver
def test_the_statistics_of_two_readings_subtract(server: RunningServer) -> None:
    with TritonRunner(server.grpc_url, MODEL_NAME) as runner:
        before = runner.statistics()
        runner.run(random_images(3))
        runner.run(random_images(1))
        delta = runner.statistics() - before
    assert (delta.num_requests, delta.num_images, delta.num_executions) == (2, 4, 2)
    assert delta.mean_batch_size == 2.0
    assert delta.milliseconds_per_request()["compute_infer_ms"] > 0


def test_arrivals_are_the_same_for_a_seed_and_have_the_rate_asked_for() -> None:
    assert arrival_times(50, 2.0, 1) == arrival_times(50, 2.0, 1)
    assert arrival_times(50, 2.0, 1) != arrival_times(50, 2.0, 2)
    times = np.array(arrival_times(100, 100.0, 0))
    assert len(times) == pytest.approx(10_000, rel=0.05)
    assert (np.diff(times) > 0).all()
    assert 0 < times[0] < times[-1] < 100
    # Poisson: gaps are exponential, their standard deviation is their mean.
    assert np.diff(times).std() == pytest.approx(0.01, rel=0.1)
    assert len(arrival_times(0.01, 0.1, 0)) == 1


def test_in_process_measures_the_call_alone() -> None:
    calls = []

    def run_one(batch: np.ndarray) -> None:
        calls.append(batch.shape)
        time.sleep(0.01)

    result = measure_in_process(run_one, random_images(3), seconds=0.3, warmup_requests=2)
    assert set(calls) == {(1, 3, 48, 64)}
    assert len(calls) == len(result.latencies_seconds) + 2
    assert 10 <= result.percentile_ms(50) < 30
    assert result.facts().keys() == REPORT_KEYS


def test_percentiles_and_throughput_come_from_the_raw_latencies() -> None:
    result = LoadResult(
        latencies_seconds=np.arange(101) / 1000,
        elapsed_seconds=2.0,
        failures=Counter({"UNAVAILABLE: full": 3}),
        statistics=ModelStatistics(
            num_requests=100,
            num_failures=3,
            num_images=100,
            num_executions=25,
            queue_seconds=1.0,
            compute_input_seconds=0.1,
            compute_infer_seconds=2.0,
            compute_output_seconds=0.1,
        ),
    )
    facts = result.facts()
    assert (facts["p50_ms"], facts["p99_ms"]) == (50.0, 99.0)
    assert facts["throughput"] == 50.5
    assert (facts["num_requests"], facts["num_failures"]) == (101, 3)
    assert facts["mean_batch_size"] == 4.0
    assert facts["queue_ms"] == 10.0
    assert facts["client_ms"] == pytest.approx(50 - 10 - 1 - 20 - 1)
