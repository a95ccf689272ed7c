"""A model that ends at candidates, through the real server: clients see the outputs of every other model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.signature import DetectorSignature
from serving.client import TritonRunner
from serving.model_repository import publish
from serving.servers import SERVERS
from tests.serving.pixel_means import assert_same_detections, needs_tritonserver, random_images

pytestmark = [pytest.mark.server, needs_tritonserver, pytest.mark.timeout(120)]


def write_candidate_model(path: Path, signature: DetectorSignature) -> Path:
    """A "detector" whose candidates are boxes with an image's channel means r, g, b as scores (r, g, b, r) / 255.

    The first two overlap and are of one class, the third is elsewhere, the fourth off the canvas.
    """
    n = helper.make_node
    nodes = [
        n("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        n("ReduceMean", ["pixels", "spatial"], ["means"], keepdims=0),  # (N, 3)
        n("Gather", ["means", "channels"], ["of_candidate"], axis=1),  # (N, 4)
        n("Div", ["of_candidate", "white"], ["candidate_scores"]),
        n("Mul", ["of_candidate", "none"], ["nothing"]),
        n("Unsqueeze", ["nothing", "last"], ["nothing_of_box"]),
        n("Add", ["nothing_of_box", "placed"], ["candidate_boxes"]),
        n("Cast", ["nothing"], ["candidate_labels"], to=TensorProto.INT32),
    ]
    placed = [[0, 0, 20, 20], [0, 0, 20, 18], [40, 5, 50, 45], [70, 0, 90, 20]]
    initializers = [
        helper.make_tensor("spatial", TensorProto.INT64, [2], [2, 3]),
        helper.make_tensor("channels", TensorProto.INT64, [4], [0, 1, 2, 0]),
        helper.make_tensor("last", TensorProto.INT64, [1], [2]),
        helper.make_tensor("white", TensorProto.FLOAT, [], [255.0]),
        helper.make_tensor("none", TensorProto.FLOAT, [], [0.0]),
        helper.make_tensor("placed", TensorProto.FLOAT, [1, 4, 4], np.array(placed, np.float32).flatten()),
    ]
    graph = helper.make_graph(
        nodes,
        "candidates",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", *signature.image_shape])],
        [
            helper.make_tensor_value_info("candidate_boxes", TensorProto.FLOAT, ["N", 4, 4]),
            helper.make_tensor_value_info("candidate_scores", TensorProto.FLOAT, ["N", 4]),
            helper.make_tensor_value_info("candidate_labels", TensorProto.INT32, ["N", 4]),
        ],
        initializer=initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def test_the_servers_backend_does_the_nms_for_every_image_of_a_batch(
    tmp_path: Path, signature: DetectorSignature
) -> None:
    model_file = write_candidate_model(tmp_path / "model.onnx", signature)
    publish(
        tmp_path / "repository",
        model_name="candidates",
        model_file=model_file,
        signature=signature,
        backend="python",
        provenance={},
        num_threads=1,
    )
    images = random_images(8)
    with (
        SERVERS["wheel"].start(tmp_path / "repository", ["candidates"], log_path=tmp_path / "log") as server,
        TritonRunner(server.grpc_url, "candidates") as runner,
    ):
        assert runner.signature == signature
        found = runner.run(images)
        alone = [runner.run(image[None])[0] for image in images[:2]]
    for image, detections in zip(images, found, strict=True):
        red, green, blue = image.reshape(3, -1).astype(np.float64).mean(axis=1).tolist()
        winner = [red, 0, 0, 20, 20] if red > green else [green, 0, 0, 20, 18]
        rows = np.array(sorted([winner, [blue, 40, 5, 50, 45]], reverse=True))
        np.testing.assert_allclose(detections.scores, rows[:, 0] / 255, rtol=1e-5)
        np.testing.assert_array_equal(detections.boxes, rows[:, 1:])
        assert detections.labels.tolist() == [0, 0]
    for single, together in zip(alone, found, strict=False):
        assert_same_detections(single, together)
