"""Export formats, by name: each makes its artifact from the one before it. A target is a module and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from export.targets.onnx_target import export_onnx
from export.targets.tensorrt_target import build_engine

TARGETS: dict[str, Callable[..., Any]] = {"onnx": export_onnx, "tensorrt": build_engine}
