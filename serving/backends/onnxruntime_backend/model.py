"""Triton Python backend that runs the detector's ONNX file with ONNX Runtime.

Copied into each model version beside ``model.onnx``, so it imports numpy, onnxruntime, Triton's own
``triton_python_backend_utils`` and nothing of this project but ``candidate_nms.py``, which is copied too: a version
directory runs wherever those are installed. An ONNX file that ends before NMS gets it here, so that clients see the
same outputs.
Session options come from the ``parameters`` of ``config.pbtxt``: ``num_threads`` (0: ONNX Runtime's choice) and
``allow_spinning`` (0 or 1).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from candidate_nms import CANDIDATES, outputs_from_candidates  # Triton puts this folder on the path

MODEL_FILE = "model.onnx"


class TritonPythonModel:
    """Triton finds the class by this name."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the model; an exception here fails the load and its message reaches the server's log."""
        config = json.loads(args["model_config"])
        (model_input,) = config["input"]
        self.input_name: str = model_input["name"]
        self.image_shape = tuple(int(size) for size in model_input["dims"])
        self.output_names = [output["name"] for output in config["output"]]
        self.signature = json.loads(config["parameters"]["signature"]["string_value"])
        directory = Path(args["model_repository"]) / args["model_version"]
        self.session = onnxruntime.InferenceSession(
            str(directory / MODEL_FILE),
            sess_options=_session_options(config["parameters"]),
            providers=_providers(args["model_instance_kind"], int(args["model_instance_device_id"])),
        )
        self.ends_at_candidates = CANDIDATES[0] in {output.name for output in self.session.get_outputs()}
        if "GPU" in args["model_instance_kind"] and "CUDAExecutionProvider" not in self.session.get_providers():
            # ONNX Runtime falls back to the CPU with a log line only; a GPU's numbers must come from a GPU.
            raise RuntimeError(
                f"the instance group asks for a GPU but ONNX Runtime loaded only {self.session.get_providers()}; "
                "install onnxruntime-gpu with its CUDA libraries or publish with serving.device=cpu"
            )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests of one dynamic batch from a single session run.

        A request that is wrong gets its own error; the others are answered.
        """
        responses: list[Any] = [None] * len(requests)
        batches: dict[int, np.ndarray] = {}
        for index, request in enumerate(requests):
            try:
                batches[index] = self._images(request)
            except Exception as error:
                responses[index] = _error_response(str(error))
        if batches:
            images = next(iter(batches.values())) if len(batches) == 1 else np.concatenate(list(batches.values()))
            try:
                outputs = self._outputs(images)
            except Exception as error:
                return [response or _error_response(f"ONNX Runtime failed: {error}") for response in responses]
            start = 0
            for index, batch in batches.items():
                stop = start + len(batch)
                responses[index] = self._response([output[start:stop] for output in outputs])
                start = stop
        return responses

    def _outputs(self, images: np.ndarray) -> list[np.ndarray]:
        """The promised outputs of a batch, in the order of ``output_names``."""
        if not self.ends_at_candidates:
            return self.session.run(self.output_names, {self.input_name: images})
        outputs = outputs_from_candidates(
            *self.session.run(list(CANDIDATES), {self.input_name: images}),
            iou_threshold=self.signature["nms_threshold"],
            max_detections=self.signature["max_detections"],
            canvas_height=self.signature["canvas_height"],
            canvas_width=self.signature["canvas_width"],
        )
        return [outputs[name] for name in self.output_names]

    def _images(self, request: Any) -> np.ndarray:
        tensor = pb_utils.get_input_tensor_by_name(request, self.input_name)
        if tensor is None:
            raise ValueError(f"the request has no input named {self.input_name!r}")
        images = tensor.as_numpy()
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self.image_shape or not len(images):
            raise ValueError(
                f"{self.input_name}: found {images.dtype} {images.shape}, "
                f"expected uint8 (N, {', '.join(map(str, self.image_shape))}) with N >= 1"
            )
        return images

    def _response(self, outputs: list[np.ndarray]) -> Any:
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor(name, array) for name, array in zip(self.output_names, outputs, strict=True)
            ]
        )


def _session_options(parameters: dict[str, dict[str, str]]) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(parameters["num_threads"]["string_value"])
    spinning = parameters["allow_spinning"]["string_value"]
    options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    options.add_session_config_entry("session.inter_op.allow_spinning", spinning)
    return options


def _providers(instance_kind: str, device_id: int) -> list[Any]:
    if "GPU" not in instance_kind:
        return ["CPUExecutionProvider"]
    onnxruntime.preload_dlls()  # CUDA and cuDNN from the pip packages beside onnxruntime
    return [("CUDAExecutionProvider", {"device_id": device_id, "use_tf32": "0"}), "CPUExecutionProvider"]


def _error_response(message: str) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message))
