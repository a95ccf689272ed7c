"""ONNX Runtime's execution providers: which can be used on this machine, and why the others cannot.

ONNX Runtime itself goes on with the CPU where a provider does not load, and says so on the terminal only; a GPU's
numbers must come from a GPU, so it is asked beforehand here.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from pathlib import Path
from typing import Any

import onnxruntime

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
_LIBRARIES = {CUDA: "libonnxruntime_providers_cuda.so", TENSORRT: "libonnxruntime_providers_tensorrt.so"}


class ProviderUnavailable(RuntimeError):
    """ONNX Runtime cannot use a provider on this machine."""

    exit_code = 4


def provider_reasons() -> dict[str, str]:
    """Why each provider cannot be used on this machine; empty where it can."""
    return {name: _reason(name) for name in (CPU, CUDA, TENSORRT)}


def session_providers(name: str, *, tf32: bool = False) -> list[Any]:
    """What a session is given to run in a provider, and what takes the nodes that this one does not.

    Args:
        tf32: whether CUDA may round the factors of float32 products to TF32. The TensorRT provider has no switch for it
            (ONNX Runtime 1.31): it builds its engines with TensorRT's default, which is TF32 on GPUs that have it.

    Raises:
        ProviderUnavailable: says why it cannot be used here.
    """
    reason = _reason(name)
    if reason:
        raise ProviderUnavailable(f"ONNX Runtime's {name} cannot be used here: {reason}")
    cuda = (CUDA, {"use_tf32": str(int(tf32))})
    providers: dict[str, list[Any]] = {CPU: [CPU], CUDA: [cuda, CPU], TENSORRT: [TENSORRT, cuda, CPU]}
    return providers[name]


def usable_providers() -> list[Any]:
    """CUDA with true float32 where it can be used, then the CPU."""
    return session_providers(CPU if _reason(CUDA) else CUDA)


def check_loaded(session: Any, providers: list[Any]) -> None:
    """Check that a session runs in the provider it was to run in.

    Raises:
        ProviderUnavailable: ONNX Runtime has gone on without it.
    """
    asked = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if asked not in session.get_providers():
        raise ProviderUnavailable(
            f"ONNX Runtime was to run in {asked} but loaded only {', '.join(session.get_providers())}"
        )


def _reason(name: str) -> str:
    if name == CPU:
        return ""
    if name not in onnxruntime.get_available_providers():
        return f"this ONNX Runtime {onnxruntime.__version__} was built without it; install onnxruntime-gpu"
    if not _has_nvidia_gpu():
        return "no NVIDIA GPU"
    onnxruntime.preload_dlls()  # CUDA and cuDNN from the pip packages beside onnxruntime
    if name == TENSORRT:
        with contextlib.suppress(Exception):  # loads its libraries from beside itself; what lacks is said below
            importlib.import_module("tensorrt")
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        for library in ("libonnxruntime_providers_shared.so", _LIBRARIES[name]):
            ctypes.CDLL(str(folder / library))
    except OSError as error:
        needs = "; it needs the libraries of TensorRT 10" if name == TENSORRT else ""
        return f"{_LIBRARIES[name]} does not load: {error}{needs}"
    return ""


def _has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver is there and sees a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
