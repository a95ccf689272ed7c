"""Triton Python backend that runs the detector's ONNX file with ONNX Runtime.

Copied into each model version beside ``model.onnx``, so it imports onnxruntime and ``batched_requests.py``, which is
copied too, and nothing else of this project: a version directory runs wherever numpy and onnxruntime are installed.
Session options come from the ``parameters`` of ``config.pbtxt``: ``num_threads`` (0: ONNX Runtime's choice) and
``allow_spinning`` (0 or 1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from batched_requests import BatchedRequests  # Triton puts this folder on the path

MODEL_FILE = "model.onnx"


class TritonPythonModel(BatchedRequests):
    """Triton finds the class by this name."""

    library = "ONNX Runtime"

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the model; an exception here fails the load and its message reaches the server's log."""
        self.read_config(args)
        self.session = onnxruntime.InferenceSession(
            str(self.directory / MODEL_FILE),
            sess_options=_session_options(self.config["parameters"]),
            providers=_providers(self.on_gpu, self.device_id),
        )
        self.model_outputs = [output.name for output in self.session.get_outputs()]
        if self.on_gpu and "CUDAExecutionProvider" not in self.session.get_providers():
            # ONNX Runtime falls back to the CPU with a log line only; a GPU's numbers must come from a GPU.
            raise RuntimeError(
                f"the instance group asks for a GPU but ONNX Runtime loaded only {self.session.get_providers()}; "
                "install onnxruntime-gpu with its CUDA libraries or publish with serving.device=cpu"
            )

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = self.session.run(self.model_outputs, {self.input_name: images})
        return dict(zip(self.model_outputs, outputs, strict=True))


def _session_options(parameters: dict[str, dict[str, str]]) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(parameters["num_threads"]["string_value"])
    spinning = parameters["allow_spinning"]["string_value"]
    options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    options.add_session_config_entry("session.inter_op.allow_spinning", spinning)
    return options


def _providers(on_gpu: bool, device_id: int) -> list[Any]:
    if not on_gpu:
        return ["CPUExecutionProvider"]
    onnxruntime.preload_dlls()  # CUDA and cuDNN from the pip packages beside onnxruntime
    return [("CUDAExecutionProvider", {"device_id": device_id, "use_tf32": "0"}), "CPUExecutionProvider"]
