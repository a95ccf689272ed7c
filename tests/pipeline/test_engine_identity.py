"""An engine is built again exactly when its ONNX file, options, TensorRT or GPU are others."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import pytest

from export.config import ExportConfig
from pipeline import environment
from pipeline.artifact import Manifest, fingerprint, plain
from pipeline.identity import identity_of
from pipeline.stages import STAGES

A10 = {"name": "NVIDIA A10", "memory_bytes": 24 * 2**30, "compute_capability": "8.6"}
(ENGINE,) = (stage for stage in STAGES if stage.name == "engine")


def key(
    monkeypatch: pytest.MonkeyPatch,
    options: Mapping[str, Any] | None = None,
    onnx_digest: str = "a",
    machine: Mapping[str, Any] | None = None,
    tensorrt: str = "10.14.1",
    distribution: str = "tensorrt",
) -> str:
    """The engine stage's fingerprint on a machine."""

    def version(name: str) -> str:
        if name != distribution:
            raise importlib.metadata.PackageNotFoundError(name)
        return tensorrt

    facts = {"gpus": [A10], "gpu_driver": "580.1", "cuda_visible_devices": None, **(machine or {})}
    monkeypatch.setattr(environment, "facts", lambda: facts)
    monkeypatch.setattr(importlib.metadata, "version", version)
    values = {field.name: ... for field in dataclasses.fields(Manifest) if field.name != "files"}
    files = {"model.onnx": {"sha256": onnx_digest, "size_bytes": 1}}
    manifest = Manifest(**(values | {"files": files, "fingerprint": "same"}))  # type: ignore[arg-type]
    config = {"export": plain(dataclasses.asdict(ExportConfig(**(options or {}))))}
    return fingerprint(identity_of(ENGINE, config, {}, {"export": manifest, "precision": manifest}, None))


@pytest.mark.parametrize(
    "changes",
    [
        {"onnx_digest": "b"},
        {"options": {"min_batch_size": 2}},
        {"options": {"opt_batch_size": 4}},
        {"options": {"max_batch_size": 16}},
        {"options": {"precision": "fp16"}},
        {"options": {"compute_capabilities": ("86",)}},
        {"tensorrt": "10.14.2"},
        {"distribution": "tensorrt_rtx"},
        {"machine": {"gpus": [A10 | {"name": "NVIDIA A40"}]}},
        {"machine": {"gpus": []}},
        {"machine": {"cuda_visible_devices": "1"}},
    ],
)
def test_another_file_option_library_or_gpu_is_another_engine(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert key(monkeypatch, **changes) != key(monkeypatch)


def test_the_same_file_options_library_and_gpu_are_the_same_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key(monkeypatch) == key(monkeypatch)
    assert key(monkeypatch, machine={"gpu_driver": "590.1"}) == key(monkeypatch), "a plan outlives the driver"


@pytest.mark.parametrize("distribution", ["tensorrt", "tensorrt-cu12", "tensorrt-cu13"])
def test_tensorrts_version_is_found_under_each_of_its_names(distribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = key(monkeypatch, distribution=distribution, tensorrt="11.1.0")
    assert other != key(monkeypatch, distribution=distribution)


def test_the_stage_declares_nothing_else_of_the_machine() -> None:
    assert set(ENGINE.environment_keys) == {"tensorrt", "tensorrt_rtx", "gpus", "cuda_visible_devices"}
