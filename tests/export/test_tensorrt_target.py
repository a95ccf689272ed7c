from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export import precision as conversion
from export.engine_session import EngineUnavailable, check_gpu, check_library, record_of
from export.precision_audit import TYPE_OF, PrecisionMismatch
from export.targets.engine_audit import audit_network, confirmed
from export.targets.tensorrt_target import UnsupportedEngine, build_engine, incapable, load_tensorrt
from tests.export.conftest import Exported, canvases

STAND_IN = Path(__file__).parents[1] / "stand_in"

pytestmark = pytest.mark.skipif(
    not hasattr(load_tensorrt(), "ComputeCapability"), reason="TensorRT proper builds only for the GPU it runs on"
)


def test_a_real_engine_for_two_architectures_builds_from_the_onnx_file_without_a_gpu(
    exported: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "model.plan"
    cache = tmp_path / "earlier.cache"
    cache.write_bytes(b"no timing cache")  # of which TensorRT-RTX has none
    facts = build_engine(
        exported.path,
        plan,
        exported.signature,
        compute_capabilities=("75", "120"),
        min_batch_size=2,
        opt_batch_size=4,
        previous_timing_cache=cache,
    )
    assert facts.library == "tensorrt_rtx"
    assert facts.batch_sizes == (2, 4, 8)
    assert facts.timing_cache.startswith("none")
    assert facts.compute_capabilities == ("75", "120")
    assert facts.size_bytes == plan.stat().st_size > 100_000
    assert facts.layers_by_dtype["FLOAT"] > 50
    assert not set(facts.layers_by_dtype) & {"HALF", "BF16", "INT8", "FP8"}
    if not torch.cuda.is_available():
        assert facts.inspector == "not run: no NVIDIA GPU"
    assert {path.name for path in tmp_path.iterdir()} == {"model.plan", "engine.json", "earlier.cache"}
    record = record_of(plan)
    assert (record.library, record.version, record.gpu) == (facts.library, facts.version, "")
    assert record.compute_capabilities == ("75", "120")
    assert check_library(record).__name__ == "tensorrt_rtx"
    with pytest.raises(EngineUnavailable, match=r"for compute capability 75, 120, found NVIDIA L4 .* 89"):
        check_gpu(record, "NVIDIA L4", "89")
    assert capfd.readouterr() == ("", "")


def test_an_unknown_precision_is_refused_with_those_that_there_are(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedEngine, match=r"'fp17'; supported: fp32, tf32, fp16, bf16, int8, fp8") as error:
        build_engine(exported.path, tmp_path / "model.plan", exported.signature, precision="fp17")
    assert error.value.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def converted(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The exported file in another precision, each made once by what stands in for ModelOpt."""
    folder = tmp_path_factory.mktemp("converted")
    images = np.stack(canvases(*exported.signature.image_shape[1:], 4))

    def path_of(precision: str) -> Path:
        path = folder / f"{precision}.onnx"
        if not path.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(conversion, "MODELOPT", STAND_IN)
                conversion.write_typed_onnx(exported.path, path, precision, images)
        return path

    return path_of


@pytest.mark.parametrize(
    ("precision", "types"), [("fp16", {"HALF", "FLOAT"}), ("int8", {"INT8", "FLOAT"}), ("tf32", {"FLOAT"})]
)
def test_a_real_engine_has_the_precision_asked_for(
    exported: Exported, converted: Callable[[str], Path], tmp_path: Path, precision: str, types: set[str]
) -> None:
    path = exported.path if precision == "tf32" else converted(precision)
    plan = tmp_path / "model.plan"
    facts = build_engine(path, plan, exported.signature, precision=precision, compute_capabilities=("75",))
    assert facts.precision == precision
    assert set(facts.layers_by_dtype) & {"FLOAT", "HALF", "BF16", "INT8", "FP8"} == types
    assert next(iter(facts.products_by_dtype)) == TYPE_OF[precision], "the most frequent one"
    assert sum(facts.products_by_dtype.values()) == exported.facts.ops["Conv"]
    assert facts.size_bytes == plan.stat().st_size > 100_000


@pytest.mark.parametrize(
    ("precision", "asked"), [("fp16", "int8"), ("int8", "fp16"), ("fp16", "fp32"), ("int8", "tf32")]
)
def test_a_file_of_another_precision_than_asked_for_is_no_engine(
    exported: Exported, converted: Callable[[str], Path], tmp_path: Path, precision: str, asked: str
) -> None:
    with pytest.raises(PrecisionMismatch, match=f"{asked} was asked for"):
        build_engine(converted(precision), tmp_path / "model.plan", exported.signature, precision=asked)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("asked", ["fp16", "bf16", "int8", "fp8"])
def test_a_float32_file_does_not_become_an_engine_of_less(exported: Exported, tmp_path: Path, asked: str) -> None:
    with pytest.raises(PrecisionMismatch, match=rf"{asked} was asked for, but 0 % of the multiplications"):
        build_engine(exported.path, tmp_path / "model.plan", exported.signature, precision=asked)


def test_a_network_whose_layers_have_other_types_than_the_file_says_is_named(
    exported: Exported, converted: Callable[[str], Path]
) -> None:
    trt = load_tensorrt()
    for precision in ("fp16", "int8"):
        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        network = builder.create_network(0)
        assert trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR)).parse(converted(precision).read_bytes())
        assert audit_network(network, precision, onnx.load(converted(precision)), "the file").products
        with pytest.raises(PrecisionMismatch, match=r"'node_Conv_\d+' \((HALF|INT8), in the file FLOAT\)"):
            audit_network(network, precision, onnx.load(exported.path), "the file")


def test_a_matrix_product_is_quantized_although_the_parser_reshapes_its_factors(tmp_path: Path) -> None:
    weight = np.ones((32, 32), np.int8)
    stored = [
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in (("w", weight), ("scale", np.float32(0.1)), ("zero", np.int8(0)))
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["middle"], name="middle"),
        helper.make_node("MatMul", ["middle", "v"], ["out"], name="last"),
    ]
    stored.append(numpy_helper.from_array(np.ones((32, 32), np.float32), "v"))
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 3, 32, 32])
    path = _written(tmp_path / "product.onnx", nodes, output, stored)
    trt = load_tensorrt()
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(path.read_bytes())
    assert audit_network(network, "int8", onnx.load(path), "the file").products == {"INT8": 1, "FLOAT": 1}


@pytest.mark.parametrize(
    ("precision", "without", "left"), [("bf16", "75", "80"), ("fp8", "86", "89"), ("fp8", "75", "120")]
)
def test_an_architecture_without_the_precision_is_left_out_with_the_reason(
    precision: str, without: str, left: str
) -> None:
    excluded = incapable(precision, (without, left))
    assert list(excluded) == [without]
    assert f"{without} has no {precision}" in excluded[without]
    assert not incapable("fp16", (without, left)) | incapable("int8", (without, left))


def test_the_inspectors_words_confirm_or_refuse_a_precision() -> None:
    half = '{"Layers": [{"Name": "x_cast_to_fp16", "Format/Datatype": "Row major linear %s"}, {"Datatype": "FP32"}]}'
    assert confirmed(half % "FP16", "fp16").startswith("fp16 confirmed")
    assert confirmed(half % "FP32", "fp32").startswith("fp32 confirmed")
    assert confirmed('{"Layers": ["x_cast_to_fp16"]}', "fp16").startswith("not confirmed")
    with pytest.raises(PrecisionMismatch, match=r"fp16 was asked for, .* finds no tensor of it"):
        confirmed(half % "FP32", "fp16")
    with pytest.raises(PrecisionMismatch, match=r"fp32 was asked for, .* finds INT8"):
        confirmed(half % "Int8", "fp32")


def test_an_unknown_architecture_is_refused_with_the_known_ones(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedEngine, match=r"\['90'\].*builds for 75, 80"):
        build_engine(exported.path, tmp_path / "model.plan", exported.signature, compute_capabilities=("90",))


def _written(
    path: Path, nodes: list[onnx.NodeProto], output: onnx.ValueInfoProto, stored: Sequence[TensorProto] = ()
) -> Path:
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, 32, 32])
    graph = helper.make_graph(nodes, "g", [images], [output], stored)
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
