"""The requests of a dynamic batch, answered from one run of the model: what this project's Triton backends share.

Copied into each model version beside ``model.py``, so only numpy, Triton's own ``triton_python_backend_utils`` and
``candidate_nms.py``, which is copied too, are imported. A model file that ends before NMS gets it here, so that clients
see the same outputs.
"""

from __future__ import annotations

import abc
import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from candidate_nms import CANDIDATES, outputs_from_candidates  # Triton puts this folder on the path


class BatchedRequests(abc.ABC):
    """Base of the class that Triton looks for; a backend loads its model in ``initialize`` and runs it in ``run``."""

    library: str
    """What runs the model, for error messages."""

    def read_config(self, args: dict[str, Any]) -> None:
        """Take inputs, outputs and the detector's signature from what Triton gives to ``initialize``."""
        self.config = json.loads(args["model_config"])
        (model_input,) = self.config["input"]
        self.input_name: str = model_input["name"]
        self.image_shape = tuple(int(size) for size in model_input["dims"])
        self.output_names = [output["name"] for output in self.config["output"]]
        self.signature = json.loads(self.config["parameters"]["signature"]["string_value"])
        self.directory = Path(args["model_repository"]) / args["model_version"]
        self.on_gpu = "GPU" in args["model_instance_kind"]
        self.device_id = int(args["model_instance_device_id"])

    @abc.abstractmethod
    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The model file's outputs by name, of a (N, 3, H, W) uint8 batch."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests of one dynamic batch from a single run.

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
                return [response or _error_response(f"{self.library} failed: {error}") for response in responses]
            start = 0
            for index, batch in batches.items():
                stop = start + len(batch)
                responses[index] = self._response([output[start:stop] for output in outputs])
                start = stop
        return responses

    def _outputs(self, images: np.ndarray) -> list[np.ndarray]:
        """The promised outputs of a batch, in the order of ``output_names``."""
        outputs = self.run(images)
        if CANDIDATES[0] in outputs:
            outputs = outputs_from_candidates(
                *(outputs[name] for name in CANDIDATES),
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


def _error_response(message: str) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message))
