"""A small "detector" with the signature's inputs and outputs, whose answers show from which image they come."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.signature import Detections, DetectorSignature

MODEL_NAME = "pixel_means"
NUM_SLOTS = 3

needs_tritonserver = pytest.mark.skipif(
    importlib.util.find_spec("pytriton") is None, reason="nvidia-pytriton, which carries tritonserver, is not installed"
)


def make_signature(**changes: object) -> DetectorSignature:
    facts: dict[str, object] = {
        "canvas_height": 48,
        "canvas_width": 64,
        "short_edge_pixels": 48,
        "max_edge_pixels": 64,
        "channel_order": "RGB",
        "pad_value": (124, 116, 104),
        "max_batch_size": 8,
        "max_detections": NUM_SLOTS,
        "score_threshold": 0.05,
        "nms_threshold": 0.5,
        "class_names": ("dark", "dim", "bright"),
        "category_ids": (1, 5, 9),
    }
    return DetectorSignature(**(facts | changes))  # type: ignore[arg-type]


def write_pixel_means_model(path: Path, signature: DetectorSignature) -> Path:
    """A "detector" whose two detections an image are the image's channel means, so that mixed-up batches are seen.

    With r, g, b the means: scores (r/255, g/255, 0), labels (floor(r/100), floor(g/100), 0), boxes
    ((0, 0, r, g), (0, 0, g, b), 0).
    """
    n = helper.make_node
    nodes = [
        n("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        n("ReduceMean", ["pixels", "spatial"], ["means"], keepdims=0),  # (N, 3)
        n("Slice", ["means", "zero", "one", "one"], ["r"]),
        n("Slice", ["means", "one", "two", "one"], ["g"]),
        n("Slice", ["means", "two", "three", "one"], ["b"]),
        n("Mul", ["r", "none"], ["empty"]),
        n("Concat", ["empty", "empty", "r", "g"], ["box0"], axis=1),
        n("Concat", ["empty", "empty", "g", "b"], ["box1"], axis=1),
        n("Concat", ["empty", "empty", "empty", "empty"], ["box2"], axis=1),
        n("Concat", ["box0", "box1", "box2"], ["flat_boxes"], axis=1),
        n("Reshape", ["flat_boxes", "boxes_shape"], ["boxes"]),
        n("Concat", ["r", "g", "empty"], ["sum_of_pixels"], axis=1),
        n("Div", ["sum_of_pixels", "white"], ["scores"]),
        n("Div", ["sum_of_pixels", "class_step"], ["float_labels"]),
        n("Cast", ["float_labels"], ["labels"], to=TensorProto.INT32),
        n("Add", ["empty", "num_found"], ["float_num"]),
        n("Cast", ["float_num"], ["num_detections"], to=TensorProto.INT32),
    ]
    integers = {"spatial": [2, 3], "zero": [0], "one": [1], "two": [2], "three": [3], "boxes_shape": [-1, NUM_SLOTS, 4]}
    floats = {"none": 0.0, "white": 255.0, "class_step": 100.0, "num_found": 2.0}
    slots = signature.max_detections
    graph = helper.make_graph(
        nodes,
        "pixel_means",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", *signature.image_shape])],
        [
            helper.make_tensor_value_info("num_detections", TensorProto.INT32, ["N", 1]),
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", slots, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", slots]),
            helper.make_tensor_value_info("labels", TensorProto.INT32, ["N", slots]),
        ],
        initializer=[helper.make_tensor(k, TensorProto.INT64, [len(v)], v) for k, v in integers.items()]
        + [helper.make_tensor(k, TensorProto.FLOAT, [], [v]) for k, v in floats.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def expected_detections(image: np.ndarray) -> Detections:
    """What :func:`write_pixel_means_model`'s graph gives for a (3, H, W) image, in numpy."""
    r, g, b = image.reshape(3, -1).astype(np.float64).mean(1).tolist()
    return Detections(
        boxes=np.array([[0, 0, r, g], [0, 0, g, b]], np.float32),
        scores=np.array([r / 255, g / 255], np.float32),
        labels=np.array([r // 100, g // 100], np.int32),
    )


def random_images(num: int, seed: int = 0) -> np.ndarray:
    """(num, 3, 48, 64) uint8 images, each of its own brightness in each channel."""
    generator = np.random.default_rng(seed)
    level = generator.integers(20, 230, (num, 3, 1, 1))
    return (level + generator.integers(-15, 16, (num, 3, 48, 64))).astype(np.uint8)


def assert_same_detections(found: Detections, expected: Detections) -> None:
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-5)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    np.testing.assert_array_equal(found.labels, expected.labels)
