from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from export.engine_session import EngineUnavailable
from export.parity import combined, match_detections
from export.runners import OnnxRuntimeRunner, TensorRTRunner, TorchRunner
from export.targets.tensorrt_target import build_engine
from tests.export.conftest import Exported, canvases
from tests.stand_in_engine import write_record


def test_torch_and_onnx_runtime_agree_on_a_batch(exported: Exported) -> None:
    signature = exported.signature
    images = np.stack(canvases(signature.canvas_height, signature.canvas_width, 5))
    with (
        TorchRunner(exported.graph, signature) as torch_runner,
        OnnxRuntimeRunner(exported.path, signature, num_threads=1, allow_spinning=False) as onnx_runner,
    ):
        pairs = zip(torch_runner.run(images), onnx_runner.run(images), strict=True)
        result = combined(match_detections(a, b, score_threshold=0.05, max_detections=100) for a, b in pairs)
    assert result.num_unmatched == 0, result
    assert result.num_matched > 200


def test_a_runner_refuses_other_shapes_types_and_batches(exported: Exported) -> None:
    signature = exported.signature
    with OnnxRuntimeRunner(exported.path, signature, num_threads=1) as runner:
        with pytest.raises(ValueError, match="found dtype float32, expected uint8"):
            runner.run(np.zeros((1, *signature.image_shape), np.float32))
        with pytest.raises(ValueError, match="found shape"):
            runner.run(np.zeros((1, 3, 32, 32), np.uint8))
        with pytest.raises(ValueError, match="found batch 9, expected 1 to 8"):
            runner.run(np.zeros((9, *signature.image_shape), np.uint8))


def test_onnx_runtime_takes_the_cpu_where_no_gpu_answers_and_says_nothing(
    exported: Exported, capfd: pytest.CaptureFixture[str]
) -> None:
    with OnnxRuntimeRunner(exported.path, exported.signature) as runner:
        assert runner.providers[-1] == "CPUExecutionProvider"
        assert torch.cuda.is_available() == ("CUDAExecutionProvider" in runner.providers)
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_onnx_runtimes_optimizer_breaks_runs_node_by_node(exported: Exported, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Clip", ["pixels", "zero", "six"], ["clipped"]),
        helper.make_node("QuantizeLinear", ["clipped", "scale", "zero_point"], ["stored"]),
        helper.make_node("DequantizeLinear", ["stored", "scale", "zero_point"], ["out"]),
    ]
    values = {"zero": 0.0, "six": 6.0, "scale": 0.5}
    stored = [helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in values.items()]
    stored.append(helper.make_tensor("zero_point", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True))
    shape = ["batch", *exported.signature.image_shape]
    ends = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind in (("images", TensorProto.UINT8), ("out", TensorProto.FLOAT))
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "fp8", ends[:1], ends[1:], stored),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "fp8.onnx")
    with OnnxRuntimeRunner(tmp_path / "fp8.onnx", exported.signature, optimize=False) as runner:
        assert runner.providers[-1] == "CPUExecutionProvider"
    with pytest.raises(Fail, match="Unexpected data type for QuantizeLinear"):  # once it loads, drop the option
        OnnxRuntimeRunner(tmp_path / "fp8.onnx", exported.signature)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")
def test_an_engine_without_a_gpu_is_unavailable_with_exit_code_4(exported: Exported, tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"plan")
    trt = pytest.importorskip("tensorrt_rtx")
    write_record(plan, library="tensorrt_rtx", version=trt.__version__)
    with pytest.raises(EngineUnavailable, match=r"no NVIDIA GPU 0 that CUDA can use \(CUDA: cudaError") as error:
        TensorRTRunner(plan, exported.signature)
    assert error.value.exit_code == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no NVIDIA GPU")
@pytest.mark.parametrize("min_batch_size", [1, 8])
def test_an_engine_agrees_with_onnx_runtime_on_the_gpu(exported: Exported, tmp_path: Path, min_batch_size: int) -> None:
    major, minor = torch.cuda.get_device_capability()
    signature = exported.signature
    capabilities = (f"{major}{minor}",)
    build_engine(
        exported.path,
        tmp_path / "model.plan",
        signature,
        compute_capabilities=capabilities,
        min_batch_size=min_batch_size,
    )
    images = np.stack(canvases(signature.canvas_height, signature.canvas_width, 5))
    with (
        TensorRTRunner(tmp_path / "model.plan", signature) as engine,
        OnnxRuntimeRunner(exported.path, signature, providers=["CPUExecutionProvider"]) as onnx_runner,
    ):
        pairs = zip(onnx_runner.run(images), engine.run(images), strict=True)
        result = combined(match_detections(a, b, score_threshold=0.05, max_detections=100) for a, b in pairs)
    assert result.num_unmatched == 0, result
