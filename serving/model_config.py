"""The part of Triton's model configuration this project uses, as typed data.

``config.pbtxt`` is never written by hand: text and dataclass are converted through Triton's own protobuf
(``tritonclient.grpc.model_config_pb2``), so a misspelt field cannot be written and none is lost when reading.
Durations carry their unit in the name, as in the protobuf.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as proto

from export.signature import DetectorSignature

Backend = Literal["python", "python_tensorrt", "onnxruntime", "tensorrt"]
MODEL_FILE_OF_BACKEND: dict[Backend, str] = {
    "python": "model.onnx",  # beside model.py, which Triton loads and which loads this one
    "python_tensorrt": "model.plan",  # likewise
    "onnxruntime": "model.onnx",
    "tensorrt": "model.plan",
}
OWN_BACKENDS = ("python", "python_tensorrt")
"""This project's, which run in Triton's Python backend and do the NMS that a model leaves to them."""
ENGINE_BACKENDS = ("python_tensorrt", "tensorrt")
"""Those that serve the engine, on a GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorConfig:
    """One input or output. ``dims`` are without the batch dimension; ``data_type`` is Triton's word (UINT8, FP32)."""

    name: str
    data_type: str
    dims: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceGroup:
    """``count`` execution instances of the model, on each GPU of ``gpus`` or on the CPU."""

    kind: Literal["CPU", "GPU"] = "CPU"
    count: int = 1
    gpus: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicBatching:
    """How Triton forms batches, and what it does when requests come faster than they are answered.

    Attributes:
        max_queue_delay_microseconds: how long a request may wait for others; 0 batches what is queued anyway.
        max_queue_size: requests waiting above which new ones are refused (UNAVAILABLE); 0 is no limit.
        default_timeout_microseconds: waiting time after which a request is refused; 0 is none.
    """

    max_queue_delay_microseconds: int = 0
    max_queue_size: int = 0
    default_timeout_microseconds: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class VersionPolicy:
    """Which versions are served: the ``latest`` n, or exactly those in ``specific`` when that is not empty."""

    latest: int = 1
    specific: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model's ``config.pbtxt``."""

    name: str
    backend: str
    max_batch_size: int
    inputs: tuple[TensorConfig, ...]
    outputs: tuple[TensorConfig, ...]
    instance_group: InstanceGroup = InstanceGroup()
    dynamic_batching: DynamicBatching = DynamicBatching()
    version_policy: VersionPolicy = VersionPolicy()
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_model_filename: str

    def to_proto(self) -> Any:
        """Triton's ``inference.ModelConfig`` message."""
        batching, policy = self.dynamic_batching, self.version_policy
        message = proto.ModelConfig(
            name=self.name,
            backend=self.backend,
            max_batch_size=self.max_batch_size,
            default_model_filename=self.default_model_filename,
            input=[proto.ModelInput(name=t.name, data_type=f"TYPE_{t.data_type}", dims=t.dims) for t in self.inputs],
            output=[proto.ModelOutput(name=t.name, data_type=f"TYPE_{t.data_type}", dims=t.dims) for t in self.outputs],
            instance_group=[
                proto.ModelInstanceGroup(
                    kind=f"KIND_{self.instance_group.kind}",
                    count=self.instance_group.count,
                    gpus=self.instance_group.gpus,
                )
            ],
            dynamic_batching=proto.ModelDynamicBatching(
                max_queue_delay_microseconds=batching.max_queue_delay_microseconds,
                default_queue_policy=proto.ModelQueuePolicy(
                    timeout_action=proto.ModelQueuePolicy.REJECT,
                    max_queue_size=batching.max_queue_size,
                    default_timeout_microseconds=batching.default_timeout_microseconds,
                ),
            ),
            parameters={key: proto.ModelParameter(string_value=value) for key, value in self.parameters.items()},
        )
        if policy.specific:
            message.version_policy.specific.versions.extend(policy.specific)
        else:
            message.version_policy.latest.num_versions = policy.latest
        return message

    def to_pbtxt(self) -> str:
        return text_format.MessageToString(self.to_proto())

    @classmethod
    def from_proto(cls, message: Any) -> ModelConfig:
        """The dataclass of a message; what this project does not use (ensembles, say) is not represented."""
        group = message.instance_group[0]
        queue = message.dynamic_batching.default_queue_policy
        return cls(
            name=message.name,
            backend=message.backend,
            max_batch_size=message.max_batch_size,
            default_model_filename=message.default_model_filename,
            inputs=tuple(_tensor_from_proto(tensor) for tensor in message.input),
            outputs=tuple(_tensor_from_proto(tensor) for tensor in message.output),
            instance_group=InstanceGroup(
                kind=proto.ModelInstanceGroup.Kind.Name(group.kind).removeprefix("KIND_"),
                count=group.count,
                gpus=tuple(group.gpus),
            ),
            dynamic_batching=DynamicBatching(
                max_queue_delay_microseconds=message.dynamic_batching.max_queue_delay_microseconds,
                max_queue_size=queue.max_queue_size,
                default_timeout_microseconds=queue.default_timeout_microseconds,
            ),
            version_policy=VersionPolicy(
                latest=message.version_policy.latest.num_versions or 1,
                specific=tuple(message.version_policy.specific.versions),
            ),
            parameters={key: value.string_value for key, value in sorted(message.parameters.items())},
        )

    @classmethod
    def from_pbtxt(cls, text: str) -> ModelConfig:
        return cls.from_proto(text_format.Parse(text, proto.ModelConfig()))


def check_model_name(where: str, name: str) -> None:
    """Raises ValueError when a model cannot have this name, which becomes a folder and a part of URLs."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"{where} is {name!r}: only letters, digits, '_' and '-' are allowed; rename it")


def _tensor_from_proto(tensor: Any) -> TensorConfig:
    return TensorConfig(
        name=tensor.name, data_type=proto.DataType.Name(tensor.data_type).removeprefix("TYPE_"), dims=tuple(tensor.dims)
    )


def model_config_for(
    signature: DetectorSignature,
    *,
    name: str,
    backend: Backend,
    provenance: Mapping[str, object] | None = None,
    instance_group: InstanceGroup = InstanceGroup(),
    dynamic_batching: DynamicBatching = DynamicBatching(),
    num_threads: int = 0,
    allow_spinning: bool = False,
) -> ModelConfig:
    """The configuration that serves a detector with this signature.

    The signature and the provenance go into ``parameters`` as JSON, so any client can read from the running server how
    to preprocess, what the classes are called and which run the model came from.

    Args:
        signature: the I/O promise; inputs, outputs and the largest batch come from it.
        name: the model's name in the repository.
        backend: "python" and "python_tensorrt" are this project's, with ONNX Runtime and TensorRT; the others Triton's.
        provenance: anything JSON can hold: digests, run name, AP.
        num_threads: threads of each ONNX Runtime session; 0 leaves it to ONNX Runtime.
        allow_spinning: whether idle session threads spin; off, since that steals cores from a client on the machine.
    """
    parameters = {
        "signature": json.dumps(dataclasses.asdict(signature)),
        "provenance": json.dumps(dict(provenance or {}), sort_keys=True),
    }
    if backend == "python":
        parameters |= {"num_threads": str(num_threads), "allow_spinning": str(int(allow_spinning))}
    elif backend == "onnxruntime" and num_threads:
        parameters["intra_op_thread_count"] = str(num_threads)
    data_types = {"float32": "FP32", "int32": "INT32"}
    return ModelConfig(
        name=name,
        backend="python" if backend in OWN_BACKENDS else backend,
        max_batch_size=signature.max_batch_size,
        inputs=(TensorConfig(name=signature.input_name, data_type="UINT8", dims=signature.image_shape),),
        # Triton 2.51 refuses outputs of dims [], so the count is (N, 1) and not (N,).
        outputs=tuple(
            TensorConfig(name=output, data_type=data_types[dtype], dims=shape)
            for output, (dtype, shape) in signature.outputs.items()
        ),
        instance_group=instance_group,
        dynamic_batching=dynamic_batching,
        parameters=parameters,
        default_model_filename="model.py" if backend in OWN_BACKENDS else MODEL_FILE_OF_BACKEND[backend],
    )
