"""Engines run on a GPU whose memory is the processor's, and are refused before TensorRT reads them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from export.engine_session import (
    CudaError,
    EngineDamaged,
    EngineSession,
    EngineUnavailable,
    check_gpu,
    check_library,
    current_gpu,
    invalidity,
    quiet_logger,
    record_of,
)
from export.runners import OnnxRuntimeRunner, TensorRTRunner
from tests.serving.pixel_means import (
    assert_same_detections,
    expected_detections,
    make_signature,
    random_images,
    write_pixel_means_model,
)
from tests.serving.test_candidates_served import write_candidate_model
from tests.stand_in_engine import use_stand_in_gpu, write_engine, write_record


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return use_stand_in_gpu(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_pixel_means_model(tmp_path / "model.onnx", make_signature())


@pytest.mark.parametrize("num_images", [1, 2, 3, 8])
@pytest.mark.parametrize("profile", [(1, 8, 8), (4, 4, 8), (8, 8, 8)])
def test_every_batch_is_answered_whatever_the_engines_smallest(
    gpu: ModuleType, model: Path, tmp_path: Path, profile: tuple[int, int, int], num_images: int
) -> None:
    plan = write_engine(tmp_path / "engine", model, profile)
    images = random_images(num_images)
    with TensorRTRunner(plan, make_signature()) as runner:
        for batch in (images, images[::-1]):  # buffers are used again, and views are not contiguous
            for image, found in zip(batch, runner.run(batch), strict=True):
                assert_same_detections(found, expected_detections(image))
    assert not gpu.memory, "all device memory is freed"


def test_an_engine_that_ends_at_candidates_gets_its_nms(gpu: ModuleType, tmp_path: Path) -> None:
    signature = make_signature()
    path = write_candidate_model(tmp_path / "model.onnx", signature)
    plan = write_engine(tmp_path / "engine", path)
    with TensorRTRunner(plan, signature) as engine, OnnxRuntimeRunner(path, signature, num_threads=1) as onnx_runner:
        images = random_images(5)
        for found, expected in zip(engine.run(images), onnx_runner.run(images), strict=True):
            assert len(expected.scores) == 2
            assert_same_detections(found, expected)


def test_more_images_than_the_engine_takes_and_an_error_of_the_gpu_are_errors(
    gpu: ModuleType, model: Path, tmp_path: Path
) -> None:
    session = EngineSession(write_engine(tmp_path / "engine", model, (1, 2, 2)), "images")
    with pytest.raises(ValueError, match="found a batch of 3, it takes at most 2"):
        session.run(random_images(3))
    gpu.memory.clear()
    with pytest.raises(CudaError, match="cudaErrorInvalidValue"):
        session.run(random_images(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "10.98.0"}, r"built with tensorrt 10\.98\.0, found tensorrt 10\.99\.0"),
        ({"library": "tensorrt_dispatch"}, r"built with tensorrt_dispatch 10\.99\.0, which cannot be imported here"),
        ({"compute_capabilities": ("90",)}, r"capability 90 \(Stand-in GPU\), found Stand-in GPU of .* 86"),
        ({"gpu": "NVIDIA A10"}, r"built and tuned on NVIDIA A10, found Stand-in GPU of compute capability 86"),
    ],
)
def test_an_engine_of_another_version_or_gpu_is_refused_before_it_is_read(
    gpu: ModuleType, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"TensorRT would say: not a plan")
    write_record(plan, **changes)
    with pytest.raises(EngineUnavailable, match=message) as error:
        TensorRTRunner(plan, make_signature())
    assert error.value.exit_code == 4
    assert "--from engine --force" in str(error.value)


def test_an_engine_of_the_other_library_names_the_architectures_to_build_for(gpu: ModuleType, tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"plan")
    write_record(plan, library="tensorrt_rtx", gpu="", compute_capabilities=("75", "120"))
    with pytest.raises(EngineUnavailable, match=r"for compute capability 75, 120, found .* with '86' in it"):
        check_gpu(record_of(plan), *current_gpu())
    write_record(plan, library="tensorrt_rtx", gpu="", compute_capabilities=("75", "86"))
    check_gpu(record_of(plan), *current_gpu())


def test_a_plan_that_the_library_does_not_take_is_refused_with_its_words(gpu: ModuleType, tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"not a plan")
    write_record(plan)
    with pytest.raises(EngineUnavailable, match=r"does not load in tensorrt 10\.99\.0 on Stand-in GPU: not a plan"):
        EngineSession(plan, "images")


def test_a_damaged_plan_or_record_is_refused_with_exit_code_5(tmp_path: Path, model: Path) -> None:
    plan = write_engine(tmp_path, model)
    whole, record = plan.read_bytes(), plan.with_name("engine.json")
    plan.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EngineDamaged, match=rf"has {len(whole) // 2} bytes, expected {len(whole)}") as error:
        record_of(plan)
    assert error.value.exit_code == 5
    plan.write_bytes(whole[:-1] + b"?")
    with pytest.raises(EngineDamaged, match="has SHA-256"):
        record_of(plan)
    plan.unlink()
    with pytest.raises(EngineDamaged, match=r"model\.plan with its engine\.json cannot be read: .*No such file"):
        record_of(plan)
    plan.write_bytes(whole)
    content = json.loads(record.read_text())
    for damaged in ("{", "[]", json.dumps({"library": "tensorrt"}), json.dumps({**content, "more": 1})):
        record.write_text(damaged)
        with pytest.raises(EngineDamaged, match="cannot be read"):
            record_of(plan)
    record.unlink()
    with pytest.raises(EngineDamaged, match=r"cannot be read: .*engine\.json"):
        record_of(plan)


def test_a_library_that_is_not_installed_is_named(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineUnavailable, match=r"Install tensorrt 10\.99\.0\. Build it again here"):
        check_library(record_of(write_engine(tmp_path, model)))


def test_tensorrt_rtx_itself_says_what_is_wrong_with_a_file() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = quiet_logger(trt)
    assert "MALFORMED_ENGINE" in invalidity(trt, trt.Runtime(logger), np.random.default_rng(0).bytes(1000))
