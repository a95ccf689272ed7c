"""Stands in for NVIDIA's bindings of CUDA: one GPU whose memory is the processor's.

Work is queued and done when the stream is waited for, as on a GPU, so code that reads too early reads nothing.
"""

from __future__ import annotations

import ctypes
import enum
import types
from collections.abc import Callable


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorInvalidDevice = 101


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


OK = cudaError_t.cudaSuccess
memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
queue: list[Callable[[], object]] = []
gpu = types.SimpleNamespace(name=b"Stand-in GPU\0\0", major=8, minor=6)


def cudaGetDeviceProperties(device: int) -> tuple[object, ...]:
    return (OK, gpu) if device == 0 else (cudaError_t.cudaErrorInvalidDevice, None)


def cudaSetDevice(device: int) -> tuple[object, ...]:
    return (OK if device == 0 else cudaError_t.cudaErrorInvalidDevice,)


def cudaMalloc(size: int) -> tuple[object, ...]:
    buffer = ctypes.create_string_buffer(size)
    memory[ctypes.addressof(buffer)] = buffer
    return OK, ctypes.addressof(buffer)


def cudaFree(address: int) -> tuple[object, ...]:
    return (OK if memory.pop(address, None) is not None else cudaError_t.cudaErrorInvalidValue,)


def cudaStreamCreate() -> tuple[object, ...]:
    return OK, 7


def cudaStreamDestroy(stream: int) -> tuple[object, ...]:
    return (OK,)


def cudaMemcpyAsync(to: int, source: int, size: int, kind: int, stream: int) -> tuple[object, ...]:
    on_gpu = to if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else source
    if on_gpu not in memory or size > len(memory[on_gpu]):
        return (cudaError_t.cudaErrorInvalidValue,)
    queue.append(lambda: ctypes.memmove(to, source, size))
    return (OK,)


def cudaStreamSynchronize(stream: int) -> tuple[object, ...]:
    for work in queue:
        work()
    queue.clear()
    return (OK,)
