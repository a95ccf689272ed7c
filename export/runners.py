"""Runners: one small protocol over every format a detector runs in, so that parity, AP and latency are written once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors
from torch import nn

from export.candidate_nms import CANDIDATES, outputs_from_candidates
from export.engine_session import CudaError, EngineSession
from export.providers import check_loaded, usable_providers
from export.signature import Detections, DetectorSignature, detections_from_outputs

ONNX_RUNTIME_ERRORS = tuple(
    getattr(onnxruntime_errors, name)
    for name in ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "NotImplemented", "RuntimeException")
)
"""What a session raises that does not load or run; ONNX Runtime has no class above them."""


class RunFailed(RuntimeError):
    """A runner does not run a batch that its signature promises."""

    exit_code = 3


class Runner(Protocol):
    """Runs a detector in one format; a context manager that closes itself.

    Attributes:
        name: for reports.
        signature: what goes in and comes out.
    """

    name: str
    signature: DetectorSignature

    def run(self, images: np.ndarray) -> list[Detections]:
        """Detect in a batch.

        Args:
            images: uint8 (N, 3, H, W), 1 <= N <= ``signature.max_batch_size``; larger sets are the caller's to split.

        Returns:
            One :class:`Detections` an image, boxes in canvas pixels.

        Raises:
            ValueError: ``images`` is not what the signature says.
            RunFailed: the model does not run this batch.
        """
        ...

    def close(self) -> None:
        """Free what the runner holds."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class TorchRunner(Runner):
    """The export graph in eager PyTorch, on the device it is on, in true float32."""

    name = "torch"

    def __init__(self, graph: nn.Module, signature: DetectorSignature) -> None:
        self.signature = signature
        self._graph = graph.eval()
        self._device = next(graph.buffers()).device

    def run(self, images: np.ndarray) -> list[Detections]:
        self.signature.check_images(images)
        # cuDNN would use TF32 for convolutions, which is not the precision that parity is about.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs = self._graph(torch.from_numpy(images).to(self._device))
        arrays = [output.cpu().numpy() for output in outputs]
        return detections_from_outputs(dict(zip(self.signature.output_names, arrays, strict=True)))

    def close(self) -> None:
        """Nothing to free: the graph is the caller's."""


class OnnxRuntimeRunner(Runner):
    """An ONNX file in ONNX Runtime, on the GPU when there is one, otherwise on the CPU."""

    name = "ONNX Runtime"

    def __init__(
        self,
        onnx_path: Path,
        signature: DetectorSignature,
        num_threads: int | None = None,
        allow_spinning: bool = True,
        providers: Sequence[Any] | None = None,
        optimize: bool = True,
    ) -> None:
        """Load the file.

        Args:
            onnx_path: from :func:`export.targets.onnx_target.export_onnx`.
            signature: the one beside it.
            num_threads: of one operator; None lets ONNX Runtime take every core.
            allow_spinning: whether idle threads spin; off where others share the cores.
            providers: see :func:`export.providers.session_providers`; None takes CUDA when it is usable, and the CPU.
            optimize: whether ONNX Runtime may rewrite the graph; False runs it node by node, as it is written.

        Raises:
            ProviderUnavailable: ONNX Runtime went on without the first of ``providers``.
        """
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(allow_spinning)))
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.signature = signature
        self._path = onnx_path
        asked = usable_providers() if providers is None else list(providers)
        self._session = onnxruntime.InferenceSession(str(onnx_path), options, providers=asked)
        check_loaded(self._session, asked)
        self._output_names = [output.name for output in self._session.get_outputs()]

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers in use, most preferred first."""
        return tuple(self._session.get_providers())

    def run(self, images: np.ndarray) -> list[Detections]:
        self.signature.check_images(images)
        try:
            outputs = self._session.run(None, {self.signature.input_name: images})
        except ONNX_RUNTIME_ERRORS as error:
            raise RunFailed(f"ONNX Runtime does not run {self._path} with {len(images)} images: {error}") from error
        return detections_from_file(dict(zip(self._output_names, outputs, strict=True)), self.signature)

    def close(self) -> None:
        del self._session


def detections_from_file(outputs: Mapping[str, np.ndarray], signature: DetectorSignature) -> list[Detections]:
    """The detections in what a model file gives; where it ends at candidates, NMS is done here."""
    if CANDIDATES[0] in outputs:
        outputs = outputs_from_candidates(
            *(outputs[name] for name in CANDIDATES),
            iou_threshold=signature.nms_threshold,
            max_detections=signature.max_detections,
            canvas_height=signature.canvas_height,
            canvas_width=signature.canvas_width,
        )
    return detections_from_outputs(outputs)


class TensorRTRunner(Runner):
    """An engine in TensorRT or TensorRT-RTX."""

    name = "TensorRT"

    def __init__(self, plan_path: Path, signature: DetectorSignature) -> None:
        """Load the engine.

        Raises:
            EngineUnavailable: no NVIDIA GPU, no TensorRT, or the engine is not for this GPU or version.
            EngineDamaged: the plan is not the one that was built.
        """
        self.signature = signature
        self._session = EngineSession(plan_path, signature.input_name)

    def run(self, images: np.ndarray) -> list[Detections]:
        self.signature.check_images(images)
        try:
            outputs = self._session.run(images)
        except CudaError as error:
            raise RunFailed(str(error)) from error
        return detections_from_file(outputs, self.signature)

    def close(self) -> None:
        self._session.close()
