"""Start a server process, wait until its models are ready, stop it: what all kinds of server share."""

from __future__ import annotations

import dataclasses
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LOOPBACK = "127.0.0.1"
_SUPERVISE = Path(__file__).parent / "supervise.py"
_POLL_SECONDS = 0.1
# supervise.GENTLE_STOP_SECONDS and what it takes to kill a process group after it
_STOP_SECONDS = 20.0


class ServerError(RuntimeError):
    """A server that cannot start: a part this machine lacks, a port in use, a model that does not load."""

    exit_code = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ports:
    """Ports on the loopback interface; 0 takes a free one."""

    grpc: int = 0
    http: int = 0
    metrics: int = 0

    def reserve(self) -> Ports:
        """The same with free ports for the zeros.

        Raises:
            ServerError: a port asked for is in use.
        """
        # All sockets stay open until every port is known, else one free port could be handed out twice.
        sockets: list[socket.socket] = []
        try:
            numbers = {}
            for field in dataclasses.fields(self):
                port = getattr(self, field.name)
                probe = socket.socket()
                sockets.append(probe)
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((LOOPBACK, port))
                except OSError as error:
                    raise ServerError(
                        f"{field.name} port {port} on {LOOPBACK} cannot be used ({error.strerror}); stop what listens "
                        f"there, or choose another port, 0 for a free one: serving.{field.name}_port in the recipe, or "
                        f"--{field.name}-port of the serve command"
                    ) from None
                numbers[field.name] = probe.getsockname()[1]
            return Ports(**numbers)
        finally:
            for probe in sockets:
                probe.close()


class RunningServer:
    """A server that answers. A context manager: leaving it stops the server.

    Attributes:
        grpc_url, http_url, metrics_url: host:port.
        log_path: what the server prints.
    """

    def __init__(self, process: subprocess.Popen[bytes], ports: Ports, log_path: Path) -> None:
        self._process = process
        self.grpc_url = f"{LOOPBACK}:{ports.grpc}"
        self.http_url = f"{LOOPBACK}:{ports.http}"
        self.metrics_url = f"{LOOPBACK}:{ports.metrics}"
        self.log_path = log_path

    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> int:
        """Block until the server ends by itself, as ``make serve`` does; its exit status."""
        return self._process.wait()

    def stop(self) -> None:
        """Stop the server and every process it started; more than once is fine."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # The server dies with its supervisor (PR_SET_PDEATHSIG).
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def start_process(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    ports: Ports,
    log_path: Path,
    scratch: Path | None = None,
    ready_timeout_seconds: float,
) -> RunningServer:
    """Start a server command under the supervisor and return when it and its models are ready.

    Args:
        environment: the whole environment of the server; nothing is inherited.
        ports: as the command was given them, none of them 0.
        log_path: overwritten with what the server prints.
        scratch: a directory that is removed when the server has ended.

    Raises:
        ServerError: it ended or was not ready in time; the message carries what its log says.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch or Path(tempfile.mkdtemp(prefix="tritonserver-"))
    supervised = [sys.executable, "-I", "-S", str(_SUPERVISE), str(os.getpid()), str(scratch), "--", *command]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            supervised,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            # Ctrl-C in a terminal reaches the pipeline alone, which then stops the server in order.
            start_new_session=True,
        )
    server = RunningServer(process, ports, log_path)
    deadline = time.monotonic() + ready_timeout_seconds
    try:
        while not _is_ready(ports.http):
            if not server.is_running():
                raise ServerError(f"{command[0]} ended before it was ready: {reason_in_log(log_path)}. See {log_path}.")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{command[0]} was not ready after {ready_timeout_seconds:.0f} s: {reason_in_log(log_path)}. "
                    f"See {log_path}; raise serving.ready_timeout_seconds if the model needs longer to load."
                )
            time.sleep(_POLL_SECONDS)
    except BaseException:
        server.stop()
        raise
    return server


def tritonserver_arguments(repository: Path | str, model_names: Sequence[str], ports: Ports, address: str) -> list[str]:
    """The arguments every tritonserver gets, whoever brings the binary: only the models named are loaded, and
    a configuration is taken as written or refused."""
    return [
        f"--model-repository={repository}",
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in model_names),
        "--disable-auto-complete-config",
        f"--grpc-address={address}",
        f"--grpc-port={ports.grpc}",
        f"--http-address={address}",
        f"--http-port={ports.http}",
        f"--metrics-address={address}",
        f"--metrics-port={ports.metrics}",
        "--exit-timeout-secs=5",
    ]


def reason_in_log(log_path: Path) -> str:
    """What a server's log says about why it failed, without time stamps and stack traces, as one sentence."""
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    # Triton prefixes errors with E and the date. Others (the dynamic loader, docker) do not, so then the end counts.
    errors = [re.sub(r"^E\d{4} [\d:.]+ +\d+ \S+\] *", "", line) for line in lines if re.match(r"E\d{4} ", line)]
    telling = [
        line for line in errors if re.search(r"failed to load .* version|already in use|[Ff]ailed to start", line)
    ]
    found = list(dict.fromkeys(telling or errors or lines[-3:]))
    shortened = [line.split(r"\n\nAt:")[0].replace(r"\n", " ").strip(' "') for line in found]
    return " | ".join(shortened[:3]) or "its log is empty"


def _is_ready(http_port: int) -> bool:
    """Whether the server says that it and all its models are ready (``--strict-readiness`` is Triton's default)."""
    connection = http.client.HTTPConnection(LOOPBACK, http_port, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
