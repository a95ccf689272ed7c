"""The backend's own code, loaded as Triton loads it but for Triton's module, which it needs to answer requests only."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

from export.signature import DetectorSignature
from serving.model_config import model_config_for
from serving.model_repository import publish


def test_a_gpu_asked_for_but_not_used_fails_the_load_and_names_the_setting(
    tmp_path: Path, model_file: Path, signature: DetectorSignature, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, model_name="m", model_file=model_file, signature=signature, backend="python", provenance={})
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
    monkeypatch.syspath_prepend(tmp_path / "m" / "1")
    spec = importlib.util.spec_from_file_location("backend_under_test", tmp_path / "m" / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    # What ONNX Runtime does where CUDA does not load: it goes on with what is left.
    monkeypatch.setattr(backend, "_providers", lambda kind, device: ["CPUExecutionProvider"])
    config = model_config_for(signature, name="m", backend="python")
    arguments = {
        "model_config": json.dumps(
            {
                "input": [{"name": tensor.name, "dims": tensor.dims} for tensor in config.inputs],
                "output": [{"name": tensor.name} for tensor in config.outputs],
                "parameters": {key: {"string_value": value} for key, value in config.parameters.items()},
            }
        ),
        "model_repository": str(tmp_path / "m"),
        "model_version": "1",
        "model_instance_device_id": "0",
    }
    backend.TritonPythonModel().initialize(arguments | {"model_instance_kind": "CPU"})
    with pytest.raises(RuntimeError, match=r"asks for a GPU .*serving\.device=cpu"):
        backend.TritonPythonModel().initialize(arguments | {"model_instance_kind": "GPU"})
