"""Which of ONNX Runtime's providers can be used is said beforehand, in the words of what is missing."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from export import providers
from export.providers import CPU, CUDA, TENSORRT, ProviderUnavailable, provider_reasons, session_providers
from export.runners import OnnxRuntimeRunner
from tests.serving.pixel_means import make_signature, write_pixel_means_model

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")


@no_gpu
def test_without_a_gpu_the_cpu_alone_can_be_used_and_the_others_say_why() -> None:
    assert provider_reasons() == {CPU: "", CUDA: "no NVIDIA GPU", TENSORRT: "no NVIDIA GPU"}
    assert session_providers(CPU) == [CPU]
    for name in (CUDA, TENSORRT):
        with pytest.raises(ProviderUnavailable, match=f"{name} cannot be used here: no NVIDIA GPU") as error:
            session_providers(name)
        assert error.value.exit_code == 4


@no_gpu
def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_has_nvidia_gpu", lambda: True)
    reasons = provider_reasons()
    assert "libonnxruntime_providers_cuda.so does not load: libcuda.so.1" in reasons[CUDA]
    assert "libonnxruntime_providers_tensorrt.so does not load: lib" in reasons[TENSORRT]
    assert reasons[TENSORRT].endswith("it needs the libraries of TensorRT 10")


def test_a_build_for_the_cpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(ProviderUnavailable, match=r"was built without it; install onnxruntime-gpu"):
        session_providers(CUDA)


def test_float32_is_float32_unless_tf32_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_reason", lambda name: "")
    assert session_providers(CUDA) == [(CUDA, {"use_tf32": "0"}), CPU]
    assert session_providers(CUDA, tf32=True) == [(CUDA, {"use_tf32": "1"}), CPU]
    assert session_providers(TENSORRT) == [TENSORRT, (CUDA, {"use_tf32": "0"}), CPU]


@no_gpu
def test_a_session_that_went_on_with_the_cpu_is_no_gpus_runner(tmp_path: Path) -> None:
    signature = make_signature()
    path = write_pixel_means_model(tmp_path / "model.onnx", signature)
    with pytest.raises(ProviderUnavailable, match=f"was to run in {CUDA} but loaded only {CPU}"):
        OnnxRuntimeRunner(path, signature, providers=[(CUDA, {"use_tf32": "0"}), CPU])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no NVIDIA GPU")
@pytest.mark.parametrize("name", [CUDA, TENSORRT])
def test_a_provider_that_can_be_used_runs_the_model(name: str, tmp_path: Path) -> None:
    reason = provider_reasons()[name]
    if reason:
        pytest.skip(f"not run: {reason}")
    signature = make_signature()
    path = write_pixel_means_model(tmp_path / "model.onnx", signature)
    with OnnxRuntimeRunner(path, signature, providers=session_providers(name)) as runner:
        assert runner.providers[0] == name
