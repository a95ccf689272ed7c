"""Triton Python backend that runs the detector's engine with TensorRT or TensorRT-RTX.

For servers without Triton's own tensorrt backend, and for engines of TensorRT-RTX, which that one cannot load. Copied
into each model version beside ``model.plan`` and ``engine.json``, so it imports ``batched_requests.py`` and
``engine_session.py``, which are copied too, and nothing else of this project: a version directory runs wherever numpy,
cuda-bindings and the library that built the engine are installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from batched_requests import BatchedRequests  # Triton puts this folder on the path
from engine_session import EngineSession

MODEL_FILE = "model.plan"


class TritonPythonModel(BatchedRequests):
    """Triton finds the class by this name."""

    library = "TensorRT"

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the engine; an exception here fails the load and its message reaches the server's log."""
        self.read_config(args)
        self.session = EngineSession(self.directory / MODEL_FILE, self.input_name, self.device_id if self.on_gpu else 0)

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self.session.run(images)

    def finalize(self) -> None:
        """Free the GPU's memory when Triton unloads the model."""
        self.session.close()
