"""Conversions, real where ModelOpt is installed; where it is not, a stand-in makes the same kinds of file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from export import precision as conversion
from export.config import ExportConfig
from export.cpu_quantization import write_cpu_int8
from export.detector_graph import detector_graph
from export.parity import combined, match_detections
from export.precision import (
    ModelOptMissing,
    TooFewCalibrationImages,
    check_modelopt,
    num_calibration_images,
    write_typed_onnx,
)
from export.precision_audit import PrecisionMismatch, compute_layers
from export.runners import OnnxRuntimeRunner
from export.targets.onnx_target import export_onnx
from export.targets.tensorrt_target import build_engine
from export.trunk import tail_nodes
from tests.export.conftest import Exported, canvases, signature_for
from tests.export.tiny_two_stage import calibrated_rcnn

STAND_IN = Path(__file__).parents[1] / "stand_in"
needs_modelopt = pytest.mark.skipif(
    not (conversion.MODELOPT / "installed").is_file(), reason="NVIDIA ModelOpt is not installed: make setup-precision"
)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "MODELOPT", STAND_IN)


@pytest.fixture
def images(exported: Exported) -> np.ndarray:
    return np.stack(canvases(*exported.signature.image_shape[1:], 8, seed=3))


def share_found_again(exported: Exported, path: Path, *, optimize: bool = True) -> float:
    """Share of the float32 file's detections that another file has too: same class, IoU 0.8, score within 0.1."""
    tests = np.stack(canvases(*exported.signature.image_shape[1:], 4, seed=5))
    with OnnxRuntimeRunner(exported.path, exported.signature) as runner:
        reference = runner.run(tests)
    with OnnxRuntimeRunner(path, exported.signature, optimize=optimize) as runner:
        found = runner.run(tests)
    result = combined(
        match_detections(
            a, b, score_threshold=0.0, max_detections=10**6, min_iou=0.8, max_box_error_pixels=2.0, max_score_error=0.1
        )
        for a, b in zip(reference, found, strict=True)
    )
    assert result.num_matched > 50
    return result.num_matched / sum(map(len, reference))


def types_of(path: Path, precision: str) -> set[tuple[str, bool]]:
    return {(layer.type, bool(layer.exempt)) for layer in compute_layers(onnx.load(path), precision)}


def test_the_cpus_int8_file_keeps_the_rule_the_detections_and_the_tail(
    exported: Exported, images: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "model_cpu.onnx"
    facts = write_cpu_int8(exported.path, path, images)
    assert [file.name for file in tmp_path.iterdir()] == ["model_cpu.onnx"]
    assert types_of(path, "int8") == {("INT8", False), ("FLOAT", True)}
    assert facts.share == 1.0
    assert (facts.num_calibration_images, facts.size_bytes) == (8, path.stat().st_size)
    assert facts.size_bytes < 0.5 * exported.path.stat().st_size
    model, original = onnx.load(path), onnx.load(exported.path)
    assert tail_nodes(model.graph)[-len(tail_nodes(original.graph)) :] == tail_nodes(original.graph)
    assert model.metadata_props == original.metadata_props, "the signature stays in it"
    assert share_found_again(exported, path) > 0.7


def test_a_two_stage_detector_keeps_its_second_stage_in_float32_and_still_runs(tmp_path: Path) -> None:
    detector = calibrated_rcnn(masks=True)
    signature = signature_for(detector, 128, 192)
    export_onnx(detector_graph(detector, signature), signature, tmp_path / "model.onnx")
    images = np.stack(canvases(128, 192, 4))
    facts = write_cpu_int8(tmp_path / "model.onnx", tmp_path / "model_cpu.onnx", images)
    assert facts.share == 1.0
    assert {"float32 tail", ""} < {
        layer.exempt for layer in compute_layers(onnx.load(tmp_path / "model_cpu.onnx"), "int8")
    }
    with OnnxRuntimeRunner(tmp_path / "model_cpu.onnx", signature) as runner:
        assert sum(map(len, runner.run(images))) > 10


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_conversion_is_run_as_a_tool_checked_and_put_in_place_of_the_trunk(
    exported: Exported, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("model.onnx")  # relative, as in a run folder of the command line; the tool runs elsewhere
    facts = write_typed_onnx(exported.path, path, precision, images)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (
        types_of(path, precision) == {"fp16": {("HALF", False)}, "int8": {("INT8", False), ("FLOAT", True)}}[precision]
    )
    assert facts.num_float32_nodes >= len(tail_nodes(onnx.load(exported.path).graph))
    assert share_found_again(exported, path) > {"fp16": 0.98, "int8": 0.7}[precision]


@needs_modelopt
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_modelopt_itself_converts_every_precision(
    exported: Exported, images: np.ndarray, tmp_path: Path, precision: str
) -> None:
    path = tmp_path / "model.onnx"
    facts = write_typed_onnx(exported.path, path, precision, images)
    assert facts.share >= 0.9
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    engine = build_engine(
        path, tmp_path / "model.plan", exported.signature, precision=precision, compute_capabilities=("75", "89")
    )
    assert list(engine.excluded) == {"bf16": ["75"], "fp8": ["75"]}.get(precision, [])
    if precision != "bf16":  # ONNX Runtime has no kernels of it on a CPU
        least = {"fp16": 0.98, "int8": 0.7, "fp8": 0.4}[precision]  # random weights amplify what is rounded
        assert share_found_again(exported, path, optimize=precision != "fp8") > least


def broken_tool(tmp_path: Path, body: str) -> Path:
    package = tmp_path / "broken" / "modelopt" / "onnx"
    package.mkdir(parents=True)
    (package / "autocast.py").write_text(f"import onnx\ndef convert_to_mixed_precision(path, **options):\n    {body}\n")
    (tmp_path / "broken" / "installed").touch()
    return tmp_path / "broken"


def test_a_tool_that_silently_converts_nothing_is_found_out_and_no_file_is_left(
    exported: Exported, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "MODELOPT", broken_tool(tmp_path, "return onnx.load(path)"))
    (tmp_path / "out").mkdir()
    with pytest.raises(PrecisionMismatch, match=r"fp16 was asked for, but 0 % of the multiplications"):
        write_typed_onnx(exported.path, tmp_path / "out" / "model.onnx", "fp16", images)
    assert not list((tmp_path / "out").iterdir())


def test_a_tool_that_fails_says_what_it_said(
    exported: Exported, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "MODELOPT", broken_tool(tmp_path, "raise ValueError('no such operator: Frob')"))
    with pytest.raises(RuntimeError, match=r"ModelOpt failed(?s:.*)no such operator: Frob"):
        write_typed_onnx(exported.path, tmp_path / "model.onnx", "fp16", images)


def test_what_is_not_installed_is_said_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "MODELOPT", tmp_path)
    check_modelopt("fp32")
    check_modelopt("tf32")
    with pytest.raises(
        ModelOptMissing, match=r"export\.precision=int8 .* not installed in .*make setup-precision"
    ) as error:
        check_modelopt("int8")
    assert error.value.exit_code == 4


def test_int8_needs_as_many_training_images_as_asked_for() -> None:
    config = ExportConfig(precision="int8")
    assert config.num_calibration_images >= 500
    assert num_calibration_images(config, 2000) == config.num_calibration_images
    with pytest.raises(
        TooFewCalibrationImages, match=r"512 .* has 205: give export\.num_calibration_images=205"
    ) as error:
        num_calibration_images(config, 205)
    assert error.value.exit_code == 2
    assert num_calibration_images(ExportConfig(precision="int8", num_calibration_images=205), 205) == 205


def test_half_precision_needs_few_images_and_fewer_the_larger_they_are() -> None:
    assert num_calibration_images(ExportConfig(precision="fp16"), 2000) == 32
    large = ExportConfig(precision="bf16", canvas=(800, 1344), short_edge_pixels=800, max_edge_pixels=1333)
    assert num_calibration_images(large, 2000) == 2
    assert num_calibration_images(ExportConfig(precision="fp16"), 7) == 7
