"""Deploy publishes nothing it cannot serve and leaves nothing unproven being served; benchmark; serve."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from export.engine_session import EngineUnavailable
from pipeline import environment
from pipeline.endpoint import deployed
from pipeline.errors import GateFailed, Unavailable
from pipeline.serving_stages import _load_gates, serve_in_foreground
from serving.client import ServerUnreachable, TritonRunner
from serving.config import BenchmarkConfig
from serving.model_config import ModelConfig
from serving.model_repository import versions
from serving.servers import SERVERS, Ports, ServerError
from tests.pipeline.small_run import PERFECT, SmallRun
from tests.serving.pixel_means import needs_tritonserver
from tests.stand_in_engine import use_stand_in_gpu

pytestmark = [pytest.mark.server, needs_tritonserver, pytest.mark.timeout(120)]


GPU_FACTS = environment.facts() | {"gpus": [{"name": "Stand-in GPU"}], "gpu_reason": None}


@pytest.fixture
def small_run(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def facts_of(small_run: SmallRun, stage: str = "deploy") -> dict[str, Any]:
    return json.loads((small_run.run_dir / stage / "manifest.json").read_text())["facts"]


def config_of(small_run: SmallRun, repository: Path | None = None) -> ModelConfig:
    return ModelConfig.from_pbtxt(((repository or small_run.repository) / "m" / "config.pbtxt").read_text())


@pytest.mark.parametrize(("nms", "others"), [("portable", {"onnxruntime", "tensorrt"}), ("outside", set())])
def test_other_servers_get_a_configuration_of_a_model_that_they_can_run_alone(
    small_run: SmallRun, nms: str, others: set[str]
) -> None:
    small_run.facts["export"] = {"nms": nms}
    small_run.run()
    assert {path.name.split(".")[1] for path in (small_run.run_dir / "deploy").glob("config.*.pbtxt")} == others


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"library": "tensorrt_rtx", "version": "1.6"}, r"tensorrt_rtx 1\.6 built .*cannot load.*=python_tensorrt"),
        ({"status": "not run", "reason": "no TensorRT here"}, "was not built: no TensorRT here"),
    ],
)
def test_an_engine_that_tritons_backend_cannot_serve_is_not_published(
    small_run: SmallRun, engine: dict[str, Any], message: str
) -> None:
    small_run.facts["engine"] |= engine
    small_run.serving |= {"server": "container", "backend": "tensorrt"}
    with pytest.raises(Unavailable, match=message):
        small_run.run()
    assert Unavailable.exit_code == 4
    assert not small_run.repository.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "10.98.0"}, r"built with tensorrt 10\.98\.0, found tensorrt 10\.99\.0"),
        ({"gpu": "NVIDIA A10"}, r"built and tuned on NVIDIA A10, found Stand-in GPU"),
    ],
)
def test_an_engine_of_another_version_or_gpu_is_not_published(
    small_run: SmallRun, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stand_in_gpu(monkeypatch)
    monkeypatch.setattr(environment, "facts", lambda: GPU_FACTS)
    small_run.engine_record = changes
    small_run.serving |= {"backend": "python_tensorrt"}
    with pytest.raises(EngineUnavailable, match=message):
        small_run.run()
    assert not small_run.repository.exists()


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_the_provenance_holds_the_ap_of_the_model_that_is_served(
    small_run: SmallRun, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no docker command, so nothing starts
    small_run.facts["engine"]["library"] = "tensorrt"
    small_run.serving |= {"server": "container", "backend": backend}
    small_run.run()
    provenance = json.loads(config_of(small_run).parameters["provenance"])
    assert provenance["AP"] == {"onnxruntime": 11.0, "tensorrt": 22.0}[backend]
    # What is printed names the run's folder, brackets and all.
    assert f"source={small_run.repository}" in small_run.output.getvalue().replace("'", "")


def test_int8_on_a_cpu_is_served_from_the_file_made_for_cpus_under_a_name_that_says_so(small_run: SmallRun) -> None:
    small_run.facts |= {"precision": "int8", "in_process": PERFECT, "int8 on a CPU": {"AP": 0.0}}
    small_run.serving |= {"model_name": "m_fp32", "device": "cpu"}
    small_run.run(until="benchmark")  # AP 0 is held against the rung of the file that is served, which has AP 0 too
    published = small_run.repository / "m_int8" / "1" / "model.onnx"
    assert published.read_bytes() == (small_run.run_dir / "precision" / "model_cpu.onnx").read_bytes()
    assert facts_of(small_run)["model_name"] == "m_int8"
    config = ModelConfig.from_pbtxt((small_run.repository / "m_int8" / "config.pbtxt").read_text())
    assert json.loads(config.parameters["provenance"])["AP"] == 0.0
    assert not (small_run.repository / "m_fp32").exists()
    gates = json.loads((small_run.run_dir / "deploy" / "manifest.json").read_text())["gates"]
    assert gates[0]["name"] == "AP of Triton, concurrency 1 minus that of ONNX Runtime, int8 (CPU), at least"


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_what_onnx_runtime_cannot_serve_on_a_cpu_is_not_published(small_run: SmallRun, precision: str) -> None:
    small_run.facts["precision"] = precision
    small_run.serving["device"] = "cpu"
    with pytest.raises(Unavailable, match=rf"export\.precision={precision} is to be served on a CPU"):
        small_run.run()
    assert not small_run.repository.exists()


def test_nothing_is_published_for_a_server_that_does_not_answer_or_cannot_start(
    small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run.serving |= {"url": "127.0.0.1:9", "repository": str(tmp_path / "shared")}
    with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:9"):
        small_run.run()
    monkeypatch.setenv("PATH", str(tmp_path))
    small_run.serving = {"model_name": "m", "server": "path", "repository": str(tmp_path / "shared")}
    with pytest.raises(ServerError, match="no tritonserver on PATH"):
        small_run.run()
    assert not (tmp_path / "shared").exists()


def test_a_version_that_fails_its_gates_gives_way_to_the_one_served_before(small_run: SmallRun) -> None:
    small_run.run()
    assert facts_of(small_run)["rolled_back_to"] is None
    for version in (2, 3):  # the third must not fall back to the second, which failed too
        small_run.facts |= {"in_process": PERFECT, "onnxruntime": {"AP": float(version)}}
        with pytest.raises(GateFailed, match=r"version 1, served before, is served again"):
            small_run.run()
        assert (facts_of(small_run)["version"], facts_of(small_run)["rolled_back_to"]) == (version, 1)
        assert config_of(small_run).version_policy.specific == (1,)
        assert json.loads(config_of(small_run).parameters["provenance"])["AP"] == 11.0, "version 1's own"
    deployed(small_run.run_dir)  # the configuration recorded is the one after rolling back
    with (
        SERVERS["wheel"].start(small_run.repository, ["m"], log_path=small_run.run_dir / "log") as server,
        TritonRunner(server.grpc_url, "m") as runner,
    ):
        assert runner.provenance["AP"] == 11.0
    small_run.facts |= {"in_process": [], "onnxruntime": {"AP": 4.0}}
    small_run.run()
    assert (facts_of(small_run)["version"], facts_of(small_run)["rolled_back_to"]) == (4, None)
    assert config_of(small_run).version_policy.specific == ()


def test_a_first_version_that_fails_its_gates_has_nothing_to_give_way_to(small_run: SmallRun) -> None:
    small_run.facts["in_process"] = PERFECT
    with pytest.raises(GateFailed) as failure:
        small_run.run()
    assert "served again" not in str(failure.value)
    assert facts_of(small_run)["rolled_back_to"] is None
    assert config_of(small_run).version_policy.specific == ()


def test_a_running_server_serves_the_earlier_version_again(small_run: SmallRun, tmp_path: Path) -> None:
    small_run.run()
    shared = small_run.repository
    with SERVERS["wheel"].start(shared, ["m"], log_path=tmp_path / "log") as server:
        small_run.serving |= {"url": server.grpc_url, "repository": str(shared)}
        small_run.facts |= {"in_process": PERFECT, "onnxruntime": {"AP": 2.0}}
        with pytest.raises(GateFailed, match="served again"):
            small_run.run()
        assert versions(shared, "m") == [1, 2]
        with TritonRunner(server.grpc_url, "m") as runner:
            assert runner.provenance["AP"] == 11.0


def test_a_version_that_does_not_load_gives_way_too(small_run: SmallRun) -> None:
    small_run.run()
    small_run.serving["ready_timeout_seconds"] = 1e-9
    small_run.facts["onnxruntime"] = {"AP": 2.0}
    with pytest.raises(ServerError, match="was not ready"):
        small_run.run()
    assert config_of(small_run).version_policy.specific == (1,)


def test_one_request_at_a_time_is_measured_and_what_the_overhead_and_the_objective_refer_to(
    small_run: SmallRun,
) -> None:
    small_run.benchmark |= {"concurrencies": (3,), "max_p99_ms": 1e6}
    small_run.run(until="benchmark")
    found = facts_of(small_run, "benchmark")
    assert [row["concurrency"] for row in found["closed_loop"]] == [1, 3]
    alone = found["closed_loop"][0]
    assert found["serving_overhead_ms"] == pytest.approx(alone["p50_ms"] - found["in_process"]["p50_ms"])


def test_the_objective_is_held_against_concurrency_1_wherever_it_stands() -> None:
    rows = [{"concurrency": 8, "p99_ms": 80.0, "num_failures": 0}, {"concurrency": 1, "p99_ms": 9.0, "num_failures": 0}]
    gate = _load_gates(rows, [], BenchmarkConfig(max_p99_ms=10.0))[-1]
    assert (gate.name, gate.value, gate.passed) == ("p99 latency in ms at concurrency 1", 9.0, True)


def _running_servers() -> set[psutil.Process]:
    """The servers of this process; the fixture of the serving tests may be one of them."""
    return {process for process in psutil.Process().children(recursive=True) if process.name() == "tritonserver"}


def test_a_server_that_dies_while_serving_is_an_error_with_its_status_and_log(small_run: SmallRun) -> None:
    small_run.run()
    of_other_tests = _running_servers()

    def kill_it_when_ready() -> None:
        deadline = time.monotonic() + 60
        while "try " not in small_run.output.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in _running_servers() - of_other_tests:
            os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_it_when_ready)
    killer.start()
    try:
        with pytest.raises(ServerError, match=r"'?m'? ended by itself with status 137: .*server\.log"):
            serve_in_foreground(small_run.run_dir, Ports(), small_run.console)
    finally:
        killer.join()
    assert f"log      {small_run.run_dir}" in small_run.output.getvalue(), "brackets are not markup"
    assert "m version 1 is ready" in small_run.output.getvalue()
