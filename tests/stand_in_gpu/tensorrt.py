"""Stands in for TensorRT's runtime: a "plan" is an ONNX file, run by ONNX Runtime on the stand-in GPU's memory.

The optimisation profile is the file's metadata ``profile``, "smallest,opt,largest" batch.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime
import stand_in_cuda as cudart

sys.modules["cuda.bindings.runtime"] = cudart

__version__ = "10.99.0"
TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(int32)": np.int32}


class ILogger:
    WARNING = 2

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


def nptype(dtype: type) -> type:
    return dtype


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        try:
            return Engine(onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"]))
        except Exception as error:
            self.logger.log(1, f"not a plan ({type(error).__name__})")
            return None


class Engine:
    def __init__(self, session: Any) -> None:
        self.session = session
        self.tensors = {each.name: each for each in (*session.get_inputs(), *session.get_outputs())}
        self.num_io_tensors = len(self.tensors)
        found = session.get_modelmeta().custom_metadata_map.get("profile", "1,8,8")
        self.batches = [int(size) for size in found.split(",")]

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> type:
        return TYPES[self.tensors[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self.tensors[name].shape[1:])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(batch, *self.tensors[name].shape[1:]) for batch in self.batches]

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.input_shape: tuple[int, ...] = ()

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.input_shape = tuple(shape)
        return True

    def execute_async_v3(self, stream: int) -> bool:
        smallest, _, largest = self.engine.batches
        if not smallest <= self.input_shape[0] <= largest:
            return False
        cudart.queue.append(self._run)
        return True

    def _run(self) -> None:
        (name,) = (each.name for each in self.engine.session.get_inputs())
        size = int(np.prod(self.input_shape))
        images = np.frombuffer(cudart.memory[self.addresses[name]], np.uint8, size).reshape(self.input_shape)
        names = [each.name for each in self.engine.session.get_outputs()]
        for output, array in zip(names, self.engine.session.run(names, {name: images}), strict=True):
            buffer = np.frombuffer(cudart.memory[self.addresses[output]], np.uint8)
            buffer[: array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
