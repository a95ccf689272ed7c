"""The real tritonserver from the wheel: starts, says why when it does not, and never outlives its owner."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from export.signature import DetectorSignature
from serving.client import served_models
from serving.model_repository import publish
from serving.servers import SERVERS, Ports, RunningServer, ServerError, wheel
from serving.servers.container import IMAGE, container_command, docker_engine_missing
from serving.servers.running import reason_in_log
from tests.serving.pixel_means import MODEL_NAME, needs_tritonserver

pytestmark = pytest.mark.timeout(120)


def processes_with(text: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if any(text in argument for argument in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_gone(text: str, seconds: float = 20.0) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    while (left := processes_with(text)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.mark.server
@needs_tritonserver
def test_every_port_listens_on_loopback_only(server: RunningServer) -> None:
    ports = {int(url.rsplit(":", 1)[1]) for url in (server.grpc_url, server.http_url, server.metrics_url)}
    (supervisor,) = [process for process in processes_with("supervise.py") if str(min(ports)) in str(process.cmdline())]
    listening = {
        connection.laddr
        for process in supervisor.children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} == ports


@pytest.mark.server
@needs_tritonserver
def test_serving_leaves_the_version_directory_as_it_was_published(server: RunningServer, repository: Path) -> None:
    assert not [path for path in repository.rglob("*.pyc")]


@pytest.mark.server
@needs_tritonserver
def test_a_stopped_server_leaves_no_process_and_no_scratch_files(repository: Path, tmp_path: Path) -> None:
    server = SERVERS["wheel"].start(repository, [MODEL_NAME], log_path=tmp_path / "log")
    assert server.is_running()
    port = server.grpc_url.rsplit(":", 1)[1]
    (supervisor,) = [process for process in processes_with("supervise.py") if port in str(process.cmdline())]
    scratch = Path(supervisor.cmdline()[5])
    assert (scratch / "backends").is_dir()
    processes = [supervisor, *supervisor.children(recursive=True)]
    server.stop()
    server.stop()
    assert not [process for process in processes if process.is_running()]
    assert not scratch.exists()


@pytest.mark.server
@needs_tritonserver
@pytest.mark.parametrize("victim", ["owner", "supervisor"])
def test_kill_9_of_the_owner_or_of_the_supervisor_leaves_no_server(
    repository: Path, tmp_path: Path, victim: str
) -> None:
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from serving.servers import SERVERS
        SERVERS["wheel"].start(Path({str(repository)!r}), [{MODEL_NAME!r}], log_path=Path({str(tmp_path / "log")!r}))
        Path({str(tmp_path / "ready")!r}).touch()
        time.sleep(100)
    """)
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 40
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        tree = psutil.Process(owner.pid).children(recursive=True)
        assert any("tritonserver" in process.exe() for process in tree)
        os.kill(owner.pid if victim == "owner" else tree[0].pid, signal.SIGKILL)
        left = [process for process in tree if process.pid != (tree[0].pid if victim == "supervisor" else None)]
        assert not psutil.wait_procs(left, timeout=20)[1]  # a killed supervisor stays a zombie until its owner ends
    finally:
        owner.kill()
        owner.wait()


@needs_tritonserver
def test_a_repository_whose_path_has_a_blank_is_served(repository: Path, tmp_path: Path) -> None:
    blank = tmp_path / "my runs"
    shutil.copytree(repository / MODEL_NAME, blank / MODEL_NAME)
    with SERVERS["wheel"].start(
        blank, [MODEL_NAME], log_path=blank / "server.log", ready_timeout_seconds=30.0
    ) as running:
        assert served_models(running.grpc_url) == [MODEL_NAME]


def test_a_port_in_use_is_named_with_the_setting_that_changes_it(repository: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"grpc port {port} on 127\.0\.0\.1 .*serving\.grpc_port .*--grpc-port "):
            SERVERS["wheel"].start(repository, [MODEL_NAME], ports=Ports(grpc=port), log_path=tmp_path / "log")
    assert ServerError.exit_code == 4


def test_free_ports_differ_and_ports_asked_for_are_kept() -> None:
    ports = Ports().reserve()
    assert len({ports.grpc, ports.http, ports.metrics}) == 3
    assert ports.reserve() == ports


@pytest.mark.server
@needs_tritonserver
def test_a_model_that_does_not_load_gives_the_reason_from_the_log(
    tmp_path: Path, model_file: Path, signature: DetectorSignature
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(model_file.read_bytes()[:-200])
    publish(tmp_path / "r", model_name="b", model_file=broken, signature=signature, backend="python", provenance={})
    with pytest.raises(ServerError, match=r"failed to load 'b' version 1.*model\.onnx.*See .*log") as caught:
        SERVERS["wheel"].start(tmp_path / "r", ["b"], log_path=tmp_path / "log")
    assert "\\n" not in str(caught.value)
    assert not wait_until_gone(str(tmp_path / "r"))


@pytest.mark.server
@needs_tritonserver
def test_a_server_that_is_not_ready_in_time_is_stopped(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"was not ready after 0 s.*serving\.ready_timeout_seconds"):
        SERVERS["wheel"].start(repository, [MODEL_NAME], log_path=tmp_path / "not_ready.log", ready_timeout_seconds=0.0)


@needs_tritonserver
def test_a_missing_python_library_is_said_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # The wheel's stub of another Python version: its library is not on this machine, as on one without any.
    missing = next((v for v in ("3.8", "3.9", "3.10") if not _has_library(f"libpython{v}.so.1.0")), None)
    if missing is None:
        pytest.skip("every Python shared library that the wheel has a stub for is installed")
    monkeypatch.setattr(wheel, "_PYTHON", missing)
    monkeypatch.setattr(wheel, "_LIBPYTHON", f"libpython{missing}.so.1.0")
    with pytest.raises(ServerError, match=rf"apt-get install -y libpython{missing} "):
        wheel.check()


def test_the_wheels_server_sees_the_gpus_its_caller_sees_and_nothing_else_of_the_shell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert wheel._environment()["CUDA_VISIBLE_DEVICES"] == "1"
    assert "PYTHONPATH" not in wheel._environment()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES" not in wheel._environment()


def _has_library(name: str) -> bool:
    return subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout.count(name) > 0


@needs_tritonserver
def test_a_python_version_without_a_stub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "_PYTHON", "3.99")
    with pytest.raises(ServerError, match=r"no Python backend stub for Python 3\.99 .*use Python 3\.11 or 3\.12"):
        wheel.check()


def test_the_reason_is_read_from_tritons_log_without_time_stamps_and_stack_traces(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        'E1120 05:08:17.160596 11968 server.cc:241] "CudaDriverHelper has not been initialized."\n'
        "I1120 05:08:17.161508 11968 model_lifecycle.cc:472] loading\n"
        "E1120 05:08:17.527194 11968 model_lifecycle.cc:642] \"failed to load 'pm' version 1: Internal: "
        "ModuleNotFoundError: No module named 'x'\\n\\nAt:\\n  /tmp/model.py(16): <module>\\n\"\n"
    )
    assert reason_in_log(log) == "failed to load 'pm' version 1: Internal: ModuleNotFoundError: No module named 'x'"
    log.write_text("docker: invalid reference format\n")
    assert reason_in_log(log) == "docker: invalid reference format"


def test_the_container_gets_loopback_ports_a_read_only_repository_and_no_root(tmp_path: Path) -> None:
    command = container_command(tmp_path, ["a", "b"], Ports(grpc=1001, http=1002, metrics=1003), gpu=True)
    assert command[:2] == ["docker", "run"]
    assert {f"--publish=127.0.0.1:{outside}:{inside}" for outside, inside in ((1001, 8001), (1002, 8000))} < set(
        command
    )
    assert f"--mount=type=bind,source={tmp_path},target=/models,readonly" in command
    assert not {"--user=0:0", "--user=0", "--user=root"} & set(command)
    assert any(argument.startswith("--user=") for argument in command)
    assert "--gpus=all" in command
    inside = command[command.index(IMAGE) + 1 :]
    assert inside[0] == "tritonserver"
    assert {"--model-control-mode=explicit", "--load-model=a", "--load-model=b", "--grpc-port=8001"} < set(inside)
    assert "--gpus=all" not in container_command(tmp_path, ["a"], Ports(), gpu=False)


def test_without_a_docker_engine_the_container_says_that_it_never_ran(tmp_path: Path) -> None:
    if docker_engine_missing() is None:
        pytest.skip("a Docker engine answers here")
    with pytest.raises(ServerError, match="never executed here: no Docker engine answered"):
        SERVERS["container"].start(tmp_path, ["a"], log_path=tmp_path / "log")


def test_without_a_tritonserver_on_path_the_other_servers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match=r"no tritonserver on PATH.*serving\.server=wheel"):
        SERVERS["path"].start(tmp_path, ["a"], log_path=tmp_path / "log")
