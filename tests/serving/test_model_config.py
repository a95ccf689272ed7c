"""config.pbtxt is written and read through Triton's protobuf."""

from __future__ import annotations

import dataclasses
import json

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as proto

from export.signature import DetectorSignature
from serving.model_config import (
    DynamicBatching,
    InstanceGroup,
    ModelConfig,
    VersionPolicy,
    model_config_for,
)
from tests.serving.pixel_means import make_signature


def full_config(signature: DetectorSignature) -> ModelConfig:
    """Every field away from its default."""
    return dataclasses.replace(
        model_config_for(
            signature,
            name="detector",
            backend="python",
            provenance={"run": "a", "AP": 21.5},
            instance_group=InstanceGroup(kind="GPU", count=2, gpus=(0, 1)),
            dynamic_batching=DynamicBatching(
                max_queue_delay_microseconds=500, max_queue_size=64, default_timeout_microseconds=1_000_000
            ),
            num_threads=2,
            allow_spinning=True,
        ),
        version_policy=VersionPolicy(specific=(3, 4)),
    )


def test_config_to_pbtxt_to_config_is_identity(signature: DetectorSignature) -> None:
    config = full_config(signature)
    assert ModelConfig.from_pbtxt(config.to_pbtxt()) == dataclasses.replace(
        config, parameters=dict(sorted(config.parameters.items()))
    )
    latest = dataclasses.replace(config, version_policy=VersionPolicy(latest=2))
    assert ModelConfig.from_pbtxt(latest.to_pbtxt()).version_policy == VersionPolicy(latest=2)


def test_no_field_that_was_set_is_lost_in_the_message(signature: DetectorSignature) -> None:
    message = full_config(signature).to_proto()
    assert ModelConfig.from_proto(message).to_proto() == message


def test_the_same_config_is_the_same_text(signature: DetectorSignature) -> None:
    assert full_config(signature).to_pbtxt() == full_config(signature).to_pbtxt()


@pytest.mark.parametrize("backend", ["python", "python_tensorrt", "onnxruntime", "tensorrt"])
def test_the_config_of_each_backend_states_the_signature(signature: DetectorSignature, backend: str) -> None:
    config = model_config_for(signature, name="d", backend=backend, num_threads=3)  # type: ignore[arg-type]
    message = text_format.Parse(config.to_pbtxt(), proto.ModelConfig())
    assert message.backend == backend.removesuffix("_tensorrt"), "both of ours run in Triton's Python backend"
    assert message.max_batch_size == signature.max_batch_size
    (images,) = message.input
    assert (images.name, images.data_type, list(images.dims)) == ("images", proto.TYPE_UINT8, [3, 48, 64])
    slots = signature.max_detections
    assert [(t.name, t.data_type, list(t.dims)) for t in message.output] == [
        ("num_detections", proto.TYPE_INT32, [1]),  # Triton 2.51 does not load an output of dims []
        ("boxes", proto.TYPE_FP32, [slots, 4]),
        ("scores", proto.TYPE_FP32, [slots]),
        ("labels", proto.TYPE_INT32, [slots]),
    ]
    assert message.dynamic_batching.default_queue_policy.timeout_action == proto.ModelQueuePolicy.REJECT
    expected_file = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}.get(backend, "model.py")
    assert message.default_model_filename == expected_file


def test_masks_are_one_more_output() -> None:
    signature = make_signature(mask_size=28)
    config = model_config_for(signature, name="d", backend="python")
    message = text_format.Parse(config.to_pbtxt(), proto.ModelConfig())
    masks = message.output[-1]
    assert (masks.name, masks.data_type, list(masks.dims)) == (
        "masks",
        proto.TYPE_FP32,
        [signature.max_detections, 28, 28],
    )
    assert len(message.output) == 5


def test_a_client_finds_signature_and_provenance_in_the_parameters(signature: DetectorSignature) -> None:
    parameters = full_config(signature).to_proto().parameters
    assert DetectorSignature.from_json(parameters["signature"].string_value) == signature
    assert json.loads(parameters["provenance"].string_value) == {"run": "a", "AP": 21.5}


def test_a_misspelt_field_in_a_config_is_not_read_over(signature: DetectorSignature) -> None:
    text = full_config(signature).to_pbtxt().replace("max_batch_size", "max_batchsize")
    with pytest.raises(text_format.ParseError, match="max_batchsize"):
        ModelConfig.from_pbtxt(text)
