"""ONNX file → TensorRT engine, strongly typed, with the precision audited."""

from __future__ import annotations

import importlib
from typing import Any


class EngineUnavailable(RuntimeError):
    """TensorRT, a GPU it needs, or an engine for this GPU is not there."""

    exit_code = 4


def load_tensorrt() -> Any:
    """The ``tensorrt`` module where its libraries are installed, otherwise ``tensorrt_rtx``.

    The ``tensorrt`` package of the public index is a stub without libraries: it fails on import or has no builder.

    Raises:
        EngineUnavailable: neither is usable.
    """
    reasons = []
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            module = importlib.import_module(name)
            module.Builder(module.Logger(module.Logger.ERROR))
        except Exception as error:  # a stub or a broken installation fails in ways of its own
            reasons.append(f"{name}: {type(error).__name__}: {error}")
        else:
            return module
    raise EngineUnavailable(f"engine: no usable TensorRT on this machine ({'; '.join(reasons)}); install tensorrt-rtx")


def quiet_logger(trt: Any) -> Any:
    """A TensorRT logger that prints nothing and keeps warnings and errors, deduplicated, in ``messages``."""

    class QuietLogger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING and message not in self.messages:
                self.messages.append(message)

    return QuietLogger()
