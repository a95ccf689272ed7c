"""An engine on a GPU, and the record beside it that says where it runs; in Python without torch.

``model.plan`` and ``engine.json`` lie side by side, in a run and in a published version. What the record says is
compared with the file, the library and the GPU before the library reads the plan: it would refuse with an error that
names neither, or run code that was tuned for another GPU. Triton's Python backend gets a copy of this file beside the
engine, so only numpy, TensorRT and NVIDIA's Python bindings of CUDA are imported here and nothing of this project.

Shape legend: N images, H × W the canvas.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np

RECORD_FILE = "engine.json"
REBUILD = "Build it again here with --from engine --force"


class EngineUnavailable(RuntimeError):
    """TensorRT, a GPU or a layer it needs, or an engine for this GPU and this version is not there."""

    exit_code = 4


class EngineDamaged(RuntimeError):
    """A plan or its record is missing, cut short or changed."""

    exit_code = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What an engine needs.

    Attributes:
        library, version: ``tensorrt`` or ``tensorrt_rtx`` and its version; engines load in no other.
        gpu: the GPU that TensorRT proper built and tuned it on; empty for TensorRT-RTX, which compiles on the GPU.
        compute_capabilities: the architectures it holds code for, "75" for 7.5.
        sha256, size_bytes: of the plan.
    """

    library: str
    version: str
    gpu: str
    compute_capabilities: tuple[str, ...]
    sha256: str
    size_bytes: int

    def write(self, directory: Path) -> None:
        (directory / RECORD_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def record_of(plan_path: Path) -> EngineRecord:
    """The record beside a plan, which is the very file it describes.

    Raises:
        EngineDamaged: one of them is missing or cannot be read, or the plan is another.
    """
    path = plan_path.with_name(RECORD_FILE)
    try:
        content = json.loads(path.read_text())
        record = EngineRecord(**{**content, "compute_capabilities": tuple(content["compute_capabilities"])})
        plan = plan_path.read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineDamaged(f"engine: {plan_path} with its {RECORD_FILE} cannot be read: {error}. {REBUILD}") from error
    if len(plan) != record.size_bytes:
        raise EngineDamaged(f"engine: {plan_path} has {len(plan)} bytes, expected {record.size_bytes}. {REBUILD}")
    found = hashlib.sha256(plan).hexdigest()
    if found != record.sha256:
        raise EngineDamaged(f"engine: {plan_path} has SHA-256 {found}, expected {record.sha256}. {REBUILD}")
    return record


def check_library(record: EngineRecord) -> Any:
    """The installed library that reads the engine.

    Raises:
        EngineUnavailable: it is not installed, or in another version.
    """
    needed = f"{record.library} {record.version}"
    try:
        library = importlib.import_module(record.library)
    except Exception as error:  # a stub without libraries fails in ways of its own
        raise EngineUnavailable(
            f"engine: built with {needed}, which cannot be imported here ({type(error).__name__}: {error}). Install "
            f"{needed}. {REBUILD}, for what is installed"
        ) from error
    if library.__version__ != record.version:
        raise EngineUnavailable(
            f"engine: built with {needed}, found {record.library} {library.__version__}, and engines load in the "
            f"version that built them only. {REBUILD}, or install {needed}"
        )
    return library


def check_gpu(record: EngineRecord, name: str, compute_capability: str) -> None:
    """Check that the engine is for a GPU.

    Args:
        name, compute_capability: the GPU's own, "75" for 7.5.

    Raises:
        EngineUnavailable: it is for others.
    """
    found = f"found {name} of compute capability {compute_capability}"
    if compute_capability not in record.compute_capabilities:
        built_for = ", ".join(record.compute_capabilities) + (f" ({record.gpu})" if record.gpu else "")
        also = "" if record.gpu else f", export.compute_capabilities with '{compute_capability}' in it"
        raise EngineUnavailable(f"engine: built for compute capability {built_for}, {found}. {REBUILD}{also}")
    if record.gpu not in ("", name):
        raise EngineUnavailable(f"engine: built and tuned on {record.gpu}, {found}. {REBUILD}")


def current_gpu(device_id: int = 0) -> tuple[str, str]:
    """Name and compute capability ("75" for 7.5) of a GPU that CUDA shows this process.

    Raises:
        EngineUnavailable: there is none, or NVIDIA's Python bindings of CUDA are not installed.
    """
    try:
        properties = _done(_cudart().cudaGetDeviceProperties(device_id))
    except CudaError as error:
        raise EngineUnavailable(f"engine: no NVIDIA GPU {device_id} that CUDA can use ({error})") from error
    return properties.name.split(b"\0")[0].decode(), f"{properties.major}{properties.minor}"


class CudaError(RuntimeError):
    """A call of CUDA failed."""


class EngineSession:
    """An engine, ready to run, with device memory for its largest batch."""

    def __init__(self, plan_path: Path, input_name: str, device_id: int = 0) -> None:
        """Load an engine.

        Raises:
            EngineDamaged: the plan is not what its record says.
            EngineUnavailable: there is no GPU, or not the library, version or GPU that the engine is for.
        """
        record = record_of(plan_path)
        trt = check_library(record)
        name, capability = current_gpu(device_id)
        check_gpu(record, name, capability)
        self._device_id, self._input = device_id, input_name
        self._cuda = _cudart()
        _done(self._cuda.cudaSetDevice(device_id))
        logger = quiet_logger(trt)
        plan = plan_path.read_bytes()
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            reasons = [*invalidity(trt, self._runtime, plan), *logger.messages]
            raise EngineUnavailable(
                f"engine: {plan_path} does not load in {trt.__name__} {trt.__version__} on {name}: "
                f"{'; '.join(reasons) or 'no reason given'}. {REBUILD}"
            )
        self._context = self._engine.create_execution_context()
        smallest, _, largest = self._engine.get_tensor_profile_shape(input_name, 0)
        self.min_batch_size, self.max_batch_size = int(smallest[0]), int(largest[0])
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._outputs = {
            each: (
                np.dtype(trt.nptype(self._engine.get_tensor_dtype(each))),
                tuple(self._engine.get_tensor_shape(each))[1:],
            )
            for each in names
            if each != input_name
        }
        self._stream = _done(self._cuda.cudaStreamCreate())
        self._buffers = {input_name: self._allocated(int(np.prod(largest)))}  # uint8
        for each, (dtype, shape) in self._outputs.items():
            self._buffers[each] = self._allocated(self.max_batch_size * dtype.itemsize * int(np.prod(shape)))
        for each, address in self._buffers.items():
            self._context.set_tensor_address(each, address)

    def _allocated(self, num_bytes: int) -> int:
        return int(_done(self._cuda.cudaMalloc(num_bytes)))

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The engine's outputs for a batch.

        Args:
            images: (N, 3, H, W) uint8 with N up to the engine's largest batch; one smaller than its smallest is filled
                up with black images, whose outputs are dropped.

        Raises:
            ValueError: the batch is larger.
            CudaError: the GPU failed.
        """
        num_images = len(images)
        if num_images > self.max_batch_size:
            raise ValueError(f"engine: found a batch of {num_images}, it takes at most {self.max_batch_size}")
        batch = np.ascontiguousarray(images)
        if num_images < self.min_batch_size:
            missing = np.zeros((self.min_batch_size - num_images, *images.shape[1:]), images.dtype)
            batch = np.concatenate([batch, missing])
        kinds = self._cuda.cudaMemcpyKind
        _done(self._cuda.cudaSetDevice(self._device_id))  # a property of the thread
        _done(
            self._cuda.cudaMemcpyAsync(
                self._buffers[self._input], batch.ctypes.data, batch.nbytes, kinds.cudaMemcpyHostToDevice, self._stream
            )
        )
        self._context.set_input_shape(self._input, batch.shape)
        if not self._context.execute_async_v3(int(self._stream)):
            raise CudaError(f"engine: TensorRT failed to run a batch of {len(batch)}")
        outputs = {}
        for name, (dtype, shape) in self._outputs.items():
            array = outputs[name] = np.empty((num_images, *shape), dtype)
            _done(
                self._cuda.cudaMemcpyAsync(
                    array.ctypes.data, self._buffers[name], array.nbytes, kinds.cudaMemcpyDeviceToHost, self._stream
                )
            )
        _done(self._cuda.cudaStreamSynchronize(self._stream))
        return outputs

    def close(self) -> None:
        """Free engine and device memory."""
        del self._context, self._engine, self._runtime
        for address in self._buffers.values():
            _done(self._cuda.cudaFree(address))
        _done(self._cuda.cudaStreamDestroy(self._stream))


def quiet_logger(trt: Any) -> Any:
    """A TensorRT logger that prints nothing and keeps warnings and errors, each once, in ``messages``."""

    class QuietLogger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING and message not in self.messages:
                self.messages.append(message)

    return QuietLogger()


def invalidity(trt: Any, runtime: Any, plan: bytes) -> list[str]:
    """Why TensorRT-RTX does not take a plan, in its own words; TensorRT proper has no such question."""
    if not hasattr(runtime, "get_engine_validity"):
        return []
    _, flags = runtime.get_engine_validity(plan)
    return [name for name, flag in trt.EngineInvalidityDiagnostics.__members__.items() if int(flags) & int(flag)]


def _cudart() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EngineUnavailable(
            f"engine: NVIDIA's Python bindings of CUDA cannot be imported ({error}); install cuda-bindings"
        ) from error


def _done(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call, of which the first item is its error."""
    error, *values = result
    if int(error) != 0:
        raise CudaError(f"CUDA: {error.name}")
    return values[0] if values else None
