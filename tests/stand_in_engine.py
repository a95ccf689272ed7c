"""Engines for the stand-in GPU: ONNX files with the record of an engine beside them."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from export.engine_session import EngineRecord

STAND_IN_GPU = Path(__file__).parent / "stand_in_gpu"
NAMES = {"stand_in_cuda": "stand_in_cuda", "cuda.bindings.runtime": "stand_in_cuda", "tensorrt": "tensorrt"}


def use_stand_in_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put TensorRT's and CUDA's stand-ins in place of the real ones; returns CUDA's."""
    loaded: dict[str, ModuleType] = {}
    for name, file in NAMES.items():
        if file not in loaded:
            spec = importlib.util.spec_from_file_location(file, STAND_IN_GPU / f"{file}.py")
            assert spec is not None
            assert spec.loader is not None
            loaded[file] = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, loaded[file])
            spec.loader.exec_module(loaded[file])
        monkeypatch.setitem(sys.modules, name, loaded[file])
    return loaded["stand_in_cuda"]


def write_engine(directory: Path, onnx_path: Path, profile: tuple[int, int, int] = (1, 8, 8), **changes: Any) -> Path:
    """An engine that runs on the stand-in GPU; ``changes`` are of its record."""
    model = onnx.load(onnx_path)
    entry = model.metadata_props.add()
    entry.key, entry.value = "profile", ",".join(map(str, profile))
    directory.mkdir(parents=True, exist_ok=True)
    plan = directory / "model.plan"
    plan.write_bytes(model.SerializeToString())
    write_record(plan, **changes)
    return plan


def write_record(plan: Path, **changes: Any) -> None:
    """The record of a plan for the stand-in GPU, but for ``changes``."""
    facts: dict[str, Any] = {
        "library": "tensorrt",
        "version": "10.99.0",
        "gpu": "Stand-in GPU",
        "compute_capabilities": ("86",),
        "sha256": hashlib.sha256(plan.read_bytes()).hexdigest(),
        "size_bytes": plan.stat().st_size,
    }
    EngineRecord(**(facts | changes)).write(plan.parent)
