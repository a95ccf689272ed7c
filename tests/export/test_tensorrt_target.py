from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from export.targets.tensorrt_target import (
    PrecisionMismatch,
    UnsupportedEngine,
    build_engine,
    load_tensorrt,
)
from tests.export.conftest import Exported

pytestmark = pytest.mark.skipif(
    not hasattr(load_tensorrt(), "ComputeCapability"), reason="TensorRT proper builds only for the GPU it runs on"
)


def test_a_real_engine_for_two_architectures_builds_from_the_onnx_file_without_a_gpu(
    exported: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "model.plan"
    facts = build_engine(exported.path, plan, exported.signature, compute_capabilities=("75", "120"))
    assert facts.library == "tensorrt_rtx"
    assert facts.compute_capabilities == ("75", "120")
    assert facts.size_bytes == plan.stat().st_size > 100_000
    assert facts.layers_by_dtype["FLOAT"] > 50
    assert not set(facts.layers_by_dtype) & {"HALF", "BF16", "INT8", "FP8"}
    if not torch.cuda.is_available():
        assert facts.inspector == "not run: no NVIDIA GPU"
    assert [path.name for path in tmp_path.iterdir()] == ["model.plan"]
    assert capfd.readouterr() == ("", "")


def test_a_precision_that_cannot_be_built_is_refused_with_those_that_can(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedEngine, match=r"'fp16'; supported: fp32, tf32") as error:
        build_engine(exported.path, tmp_path / "model.plan", exported.signature, precision="fp16")
    assert error.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_an_unknown_architecture_is_refused_with_the_known_ones(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedEngine, match=r"\['90'\].*builds for 75, 80"):
        build_engine(exported.path, tmp_path / "model.plan", exported.signature, compute_capabilities=("90",))


def _written(path: Path, nodes: list[onnx.NodeProto], output: onnx.ValueInfoProto) -> Path:
    shape = ["batch", 3, 32, 32]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)], [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_a_layer_of_another_precision_is_a_mismatch_named_and_gated(exported: Exported, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["images"], ["half"], name="to_half", to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["out"], name="to_float", to=TensorProto.FLOAT),
    ]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 3, 32, 32])
    path = _written(tmp_path / "half.onnx", nodes, output)
    with pytest.raises(PrecisionMismatch, match=r"fp32 was asked for.*'to_half'.*HALF") as error:
        build_engine(path, tmp_path / "model.plan", exported.signature)
    assert error.value.exit_code == 3
    assert not (tmp_path / "model.plan").exists()


def test_a_node_that_tensorrt_does_not_take_is_named(exported: Exported, tmp_path: Path) -> None:
    nodes = [helper.make_node("Optional", ["images"], ["maybe"], name="odd_one")]
    nodes.append(helper.make_node("OptionalGetElement", ["maybe"], ["out"], name="odd_two"))
    output = helper.make_tensor_value_info("out", TensorProto.UINT8, ["batch", 3, 32, 32])
    path = _written(tmp_path / "odd.onnx", nodes, output)
    with pytest.raises(UnsupportedEngine, match="odd_one"):
        build_engine(path, tmp_path / "model.plan", exported.signature)


def test_a_damaged_onnx_file_is_refused(exported: Exported, tmp_path: Path) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(UnsupportedEngine, match="cannot parse"):
        build_engine(path, tmp_path / "model.plan", exported.signature)
