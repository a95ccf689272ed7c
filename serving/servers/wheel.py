"""The ``tritonserver`` inside the nvidia-pytriton wheel: a real server from pip, with the Python backend only.

The wheel brings a stub executable for each Python version and needs the shared library of that Python from the system.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from serving.servers.running import LOOPBACK, Ports, RunningServer, ServerError, start_process, tritonserver_arguments

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_LIBPYTHON = f"libpython{_PYTHON}.so.1.0"


def check() -> None:
    """Check everything the server needs from this machine, in well under a second.

    Raises:
        ServerError: something is missing; the message has the command that installs it.
    """
    stub = _tritonserver_directory() / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        raise ServerError(
            f"the nvidia-pytriton wheel has no Python backend stub for Python {_PYTHON} ({stub} is missing); "
            "use Python 3.11 or 3.12, or serving.server=container"
        )
    # The dynamic loader's own answer. Without its libraries the stub ends with 127, otherwise it asks for arguments.
    attempt = subprocess.run([str(stub)], env=_environment(), capture_output=True, text=True, timeout=60, check=False)
    if attempt.returncode == 127:
        raise ServerError(
            f"Triton's Python backend cannot start on this machine: {attempt.stderr.strip()}. It needs the shared "
            f"library {_LIBPYTHON} of Python {_PYTHON}. Install it with: apt-get install -y libpython{_PYTHON} (as "
            f"root; other distributions name the package differently). The stub in the wheel is bound to this Python "
            f"version, so the library of another version does not do, and the virtual environment has to be of the "
            f"Python version whose library the system has."
        )
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".")[0]) >= 2:
        raise ServerError(
            f"numpy {numpy_version} is installed; with numpy 2 the Python backend of Triton 2.51 answers every request "
            "with empty outputs and no error. Install the pinned one: pip install 'numpy<2'"
        )


def start(
    repository: Path,
    model_names: Sequence[str],
    *,
    ports: Ports = Ports(),  # noqa: B008 (frozen)
    log_path: Path,
    use_gpu: bool = False,
    ready_timeout_seconds: float = 120.0,
) -> RunningServer:
    """Serve models of a repository on loopback ports.

    Args:
        repository: the model repository.
        model_names: which of its models to load; no other is.
        ports: a port of 0 becomes a free one.
        use_gpu: whether the server may use GPUs; where a model runs is its configuration's instance group.

    Raises:
        ServerError: see :func:`check`; or a port is in use, or a model does not load.
    """
    check()
    ports = ports.reserve()
    scratch = Path(tempfile.mkdtemp(prefix="tritonserver-"))
    # The Python backend starts its stub through a shell without quoting the model's path: a blank in it would leave the
    # server waiting for ever.
    served = scratch / "repository"
    served.symlink_to(repository.resolve())
    command = [
        str(_tritonserver_directory() / "bin" / "tritonserver"),
        *tritonserver_arguments(served, model_names, ports, LOOPBACK),
        f"--backend-directory={_backend_directory(scratch)}",
        f"--allow-gpu-metrics={str(use_gpu).lower()}",
    ]
    return start_process(
        command,
        environment=_environment(),
        ports=ports,
        log_path=log_path,
        scratch=scratch,
        ready_timeout_seconds=ready_timeout_seconds,
    )


def _tritonserver_directory() -> Path:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError(
            "the nvidia-pytriton wheel, which carries the local tritonserver, is not installed; run make with no "
            ".venv to create it anew, or use serving.server=path, serving.server=container or serving.url=host:port"
        )
    return Path(spec.origin).parent / "tritonserver"


def _backend_directory(scratch: Path) -> Path:
    """A private backend directory: the wheel's Python backend with the stub for this Python version."""
    wheel = _tritonserver_directory()
    directory = scratch / "backends" / "python"
    directory.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (directory / name).symlink_to(wheel / "backends" / "python" / name)
    stub = "triton_python_backend_stub"
    (directory / stub).symlink_to(wheel / "python_backend_stubs" / _PYTHON / stub)
    return directory.parent


def _environment() -> dict[str, str]:
    """The whole environment of the server and its backend processes.

    Explicit, so that what the caller's shell exports (a PYTHONPATH, another CUDA) cannot change what is served.
    """
    libraries = [str(_tritonserver_directory().parent.parent / "nvidia_pytriton.libs")]
    own_libraries = Path(sysconfig.get_config_var("LIBDIR") or "/nonexistent")
    if (own_libraries / _LIBPYTHON).is_file() and not own_libraries.is_relative_to("/usr"):
        # A Python built with its own shared library (pyenv, conda, standalone builds) needs none from the system.
        libraries.append(str(own_libraries))
    # Which GPUs the user lets this machine's programs see is no business of the server's.
    gpus = {"CUDA_VISIBLE_DEVICES": os.environ["CUDA_VISIBLE_DEVICES"]} if "CUDA_VISIBLE_DEVICES" in os.environ else {}
    return {
        # The stub embeds Python in isolation: it ignores PYTHONPATH, but finds the virtual environment, and so numpy
        # and onnxruntime, through the first python3 on PATH.
        "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
        "LD_LIBRARY_PATH": ":".join(libraries),
        "HOME": str(Path.home()),
        "LANG": "C.UTF-8",
        **gpus,
    }
