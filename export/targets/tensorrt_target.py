"""ONNX file → TensorRT engine, strongly typed, with the precision audited layer by layer.

``tensorrt`` where its libraries are installed, otherwise ``tensorrt_rtx``, which builds real engines on a machine
without a GPU, for several architectures at once. Strong typing makes the engine's precision the network's own types, so
the audit (:mod:`export.targets.engine_audit`) reads them from the network before the build; with a GPU the engine
inspector confirms it afterwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from export.deformable_sampling import as_samples
from export.engine_session import EngineRecord, EngineUnavailable, quiet_logger
from export.precision_audit import TYPE_OF
from export.signature import DetectorSignature
from export.targets.engine_audit import audit_network, inspect_engine, num_float_products
from export.targets.timing_cache import TIMING_CACHE, keep_timing_cache, use_timing_cache

TURING = "75"
FIRST_CAPABILITY = {"bf16": 80, "fp8": 89}
"""The first architecture that multiplies in a precision; every one has the others."""


class UnsupportedEngine(ValueError):
    """The engine asked for cannot be built: unknown precision or architecture, or a node that TensorRT refuses."""

    exit_code = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What was built.

    Attributes:
        library, version: ``tensorrt`` or ``tensorrt_rtx`` and its version.
        precision: as asked, and audited.
        batch_sizes: smallest batch the engine takes, the one it is tuned for, and the largest.
        gpu: the GPU that TensorRT proper built it on; empty for TensorRT-RTX.
        compute_capabilities: architectures the engine holds code for.
        excluded: architectures asked for that it cannot hold code for, each with the reason.
        layers_by_dtype: number of layer outputs of each type in the strongly typed network, most frequent first.
        products_by_dtype: number of its convolutions and matrix products by the type of their factors.
        size_bytes: of the plan.
        seconds: of parsing and building.
        timing_cache: whether the build went on from the measurements of an earlier one.
        inspector: what the engine inspector said, or why it was not asked.
        warnings: what the library warned of.
    """

    library: str
    version: str
    precision: str
    batch_sizes: tuple[int, int, int]
    gpu: str
    compute_capabilities: tuple[str, ...]
    excluded: dict[str, str]
    layers_by_dtype: dict[str, int]
    products_by_dtype: dict[str, int]
    size_bytes: int
    seconds: float
    timing_cache: str
    inspector: str
    warnings: tuple[str, ...]


def load_tensorrt() -> Any:
    """The ``tensorrt`` module where its libraries are installed, otherwise ``tensorrt_rtx``.

    The ``tensorrt`` package of the public index is a stub without libraries: it fails on import or has no builder.

    Raises:
        EngineUnavailable: neither is usable.
    """
    reasons = []
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            module = importlib.import_module(name)
            module.Builder(module.Logger(module.Logger.ERROR))
        except Exception as error:  # a stub or a broken installation fails in ways of its own
            reasons.append(f"{name}: {type(error).__name__}: {error}")
        else:
            return module
    raise EngineUnavailable(f"engine: no usable TensorRT on this machine ({'; '.join(reasons)}); install tensorrt-rtx")


def build_engine(
    onnx_path: Path,
    plan_path: Path,
    signature: DetectorSignature,
    *,
    precision: str = "fp32",
    compute_capabilities: Sequence[str] = ("75", "80", "86", "89", "120"),
    min_batch_size: int = 1,
    opt_batch_size: int | None = None,
    previous_timing_cache: Path | None = None,
) -> EngineFacts:
    """Build an engine for batches of up to ``signature.max_batch_size``; write its plan and its record.

    Deformable convolutions, which TensorRT-RTX has not, are built as :mod:`export.deformable_sampling` writes them.

    Args:
        onnx_path: from :func:`export.targets.onnx_target.export_onnx` or :func:`export.precision.write_typed_onnx`.
        plan_path: the file to write; it appears under its name only when it is whole. Its record, and the timing cache
            of TensorRT proper, come to lie beside it.
        signature: the one beside the ONNX file.
        precision: that of the ONNX file, one of :data:`export.precision_audit.TYPE_OF`.
        compute_capabilities: architectures for TensorRT-RTX. TensorRT proper builds for the GPU it runs on. Those that
            the network cannot be built for are left out, unless none remains.
        min_batch_size: smallest batch the engine takes.
        opt_batch_size: the batch it is tuned for; None takes the largest.
        previous_timing_cache: of an earlier build; a file that is missing, damaged or of another GPU does no harm.

    Raises:
        UnsupportedEngine: unknown precision or architecture, or TensorRT refuses the graph, with the node's name.
        UnsupportedDeformConv: a deformable convolution has no such form.
        PrecisionMismatch: a layer is not of the precision asked for.
        EngineUnavailable: no usable TensorRT, or this one has no NMS layer and the graph asks for it.
    """
    if precision not in TYPE_OF:
        raise UnsupportedEngine(f"engine: export.precision is {precision!r}; supported: {', '.join(TYPE_OF)}")
    trt = load_tensorrt()
    logger = quiet_logger(trt)
    start = time.monotonic()
    builder = trt.Builder(logger)
    model = _read(trt, onnx_path)
    network, _parser = _parsed(trt, builder, logger, model, onnx_path)  # the parser holds the network's weights
    _check_nms(trt, network)
    types = audit_network(network, precision, model, str(onnx_path))
    asked = compute_capabilities if hasattr(trt, "ComputeCapability") else [_this_gpu()[1]]
    excluded = incapable(precision, asked) | _impossible(trt, network, asked)
    remaining = [name for name in asked if name not in excluded]
    if excluded and not remaining:
        raise UnsupportedEngine(f"engine: nothing to build for: {'; '.join(excluded.values())}")
    largest = signature.max_batch_size
    batch_sizes = (min_batch_size, opt_batch_size or largest, largest)
    config = _configured(trt, builder, signature, precision, batch_sizes)
    built_for = _set_compute_capabilities(trt, config, remaining)
    timing_cache = use_timing_cache(trt, config, previous_timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UnsupportedEngine(
            f"engine: {trt.__name__} {trt.__version__} cannot build {onnx_path} for compute capabilities "
            f"{', '.join(built_for)}: {'; '.join(logger.messages) or 'no reason given'}"
        )
    keep_timing_cache(trt, config, plan_path.with_name(TIMING_CACHE))
    record = _written(trt, plan, plan_path, built_for)
    return EngineFacts(
        library=record.library,
        version=record.version,
        precision=precision,
        batch_sizes=batch_sizes,
        gpu=record.gpu,
        compute_capabilities=built_for,
        excluded=excluded,
        layers_by_dtype=types.outputs,
        products_by_dtype=types.products,
        size_bytes=record.size_bytes,
        seconds=time.monotonic() - start,
        timing_cache=timing_cache,
        inspector=inspect_engine(trt, logger, plan, precision),
        warnings=tuple(logger.messages),
    )


def _written(trt: Any, plan: Any, plan_path: Path, compute_capabilities: tuple[str, ...]) -> EngineRecord:
    """Write the plan and the record of what it runs on."""
    content = bytes(plan)
    record = EngineRecord(
        library=trt.__name__,
        version=trt.__version__,
        gpu="" if hasattr(trt, "ComputeCapability") else _this_gpu()[0],
        compute_capabilities=compute_capabilities,
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
    )
    record.write(plan_path.parent)
    partial = plan_path.with_name(plan_path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, plan_path)
    return record


def _read(trt: Any, onnx_path: Path) -> onnx.ModelProto:
    """The file's model in operators that TensorRT has."""
    try:
        model = onnx.load(onnx_path)
    except DecodeError as error:
        raise UnsupportedEngine(
            f"engine: {trt.__name__} {trt.__version__} cannot parse {onnx_path}: it is not an ONNX file ({error})"
        ) from error
    return as_samples(model)


def _parsed(trt: Any, builder: Any, logger: Any, model: onnx.ModelProto, onnx_path: Path) -> tuple[Any, Any]:
    # TensorRT 11 and TensorRT-RTX know strong typing only and ignore the flag; 10.12 needs it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in errors)
        raise UnsupportedEngine(f"engine: {trt.__name__} {trt.__version__} cannot parse {onnx_path}: {reasons}")
    return network, parser


def _check_nms(trt: Any, network: Any) -> None:
    """TensorRT-RTX reads ONNX's NonMaxSuppression, and fails in the build for lack of an implementation."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    found = [layer.name for layer in layers if layer.type == trt.LayerType.NMS]
    if trt.__name__ == "tensorrt_rtx" and found:
        raise EngineUnavailable(
            f"engine: {trt.__name__} {trt.__version__} has no implementation of NonMaxSuppression (node {found[0]!r}), "
            "which tensorrt has; export.nms=portable and export.nms=outside make an engine with either"
        )


def incapable(precision: str, compute_capabilities: Sequence[str]) -> dict[str, str]:
    """The architectures that do not multiply in the precision, with the reason."""
    first = FIRST_CAPABILITY.get(precision, 0)
    return {
        name: f"compute capability {name} has no {precision}, which begins with {first}"
        for name in compute_capabilities
        if name.isdigit() and int(name) < first
    }


def _this_gpu() -> tuple[str, str]:
    """The GPU that TensorRT proper builds on and for: its name and compute capability, "90" for 9.0."""
    import torch

    return torch.cuda.get_device_name(), "".join(map(str, torch.cuda.get_device_capability()))


def _impossible(trt: Any, network: Any, compute_capabilities: Sequence[str]) -> dict[str, str]:
    """The architectures that the network cannot be built for, with the reason.

    Turing multiplies float32 matrices in convolutions only: TensorRT-RTX refuses the fully connected layers of a
    two-stage detector there, after having compiled for every other architecture.
    """
    if trt.__name__ != "tensorrt_rtx" or TURING not in compute_capabilities:
        return {}
    num_products = num_float_products(network, trt.LayerType.MATRIX_MULTIPLY)
    if not num_products:
        return {}
    return {
        TURING: f"{trt.__name__} has no float32 matrix product for compute capability {TURING} (Turing), and the "
        f"network has {num_products}; export.compute_capabilities names the others"
    }


def _configured(
    trt: Any, builder: Any, signature: DetectorSignature, precision: str, batch_sizes: Sequence[int]
) -> Any:
    """The builder's configuration, for batches of ``batch_sizes``: smallest, tuned for, largest."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # lets the inspector name types
    if precision == "tf32":
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default
    profile = builder.create_optimization_profile()
    profile.set_shape(signature.input_name, *((batch, *signature.image_shape) for batch in batch_sizes))
    config.add_optimization_profile(profile)
    return config


def _set_compute_capabilities(trt: Any, config: Any, compute_capabilities: Sequence[str]) -> tuple[str, ...]:
    """Name the target architectures where the library takes them; returns what the engine will hold."""
    if not hasattr(trt, "ComputeCapability"):
        return tuple(compute_capabilities)
    known = {name.removeprefix("SM"): value for name, value in trt.ComputeCapability.__members__.items()}
    supported = [name for name in known if name.isdigit()]
    unknown = [name for name in compute_capabilities if name not in supported]
    if unknown or not compute_capabilities:
        raise UnsupportedEngine(
            f"engine: export.compute_capabilities is {list(compute_capabilities)}; {trt.__name__} {trt.__version__} "
            f"builds for {', '.join(supported)}"
        )
    config.num_compute_capabilities = len(compute_capabilities)
    for index, name in enumerate(compute_capabilities):
        config.set_compute_capability(known[name], index)
    return tuple(compute_capabilities)
