"""What the head predicts on each level, element by element between rungs: before top-k and NMS can hide or swap it.

Three rungs give these tensors: detectron2's own modules, the export graph in torch, and an exported file, in which they
are values of known names (``head/<tensor>/<level>``). The file that ships has no such outputs; a copy in memory has.
Of a two-stage detector they are the proposals'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from torch import nn

from export.graph_parts import HEAD_PREFIX, DetectorGraph, named_levels
from export.providers import usable_providers

HeadTensors = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Called with a (3, H, W) uint8 canvas; returns the head's tensors of it by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadDifference:
    """How far a tensor of one rung lies from that of the rung before, over all canvases.

    Attributes:
        rung, compared_with: the two.
        tensor, level: which; the finest level is 0.
        max_abs_error, mean_abs_error: of the elements.
        max_abs_value: the largest magnitude in ``compared_with``, for scale.
    """

    rung: str
    compared_with: str
    tensor: str
    level: int
    max_abs_error: float
    mean_abs_error: float
    max_abs_value: float


def detectron2_head_tensors(detector: nn.Module, graph: DetectorGraph) -> HeadTensors:
    """detectron2's own preprocessing, backbone and head; ``graph`` says how the head's tensors are called."""
    two_stage = isinstance(detector, GeneralizedRCNN)
    head = detector.proposal_generator.rpn_head if two_stage else detector.head
    in_features = detector.proposal_generator.in_features if two_stage else detector.head_in_features

    @torch.inference_mode()
    def run(canvas: np.ndarray) -> dict[str, np.ndarray]:
        images = detector.preprocess_image([{"image": torch.from_numpy(canvas)}])
        features = detector.backbone(images.tensor)
        outputs = head([features[name] for name in in_features])
        return _arrays(named_levels(graph.head_tensor_names, outputs))

    return run


def graph_head_tensors(graph: DetectorGraph) -> HeadTensors:
    """The export graph in torch."""
    device = next(graph.buffers()).device

    @torch.inference_mode()
    def run(canvas: np.ndarray) -> dict[str, np.ndarray]:
        return _arrays(graph.with_head_tensors(torch.from_numpy(canvas)[None].to(device))[1])

    return run


def onnx_head_tensors(path: Path, optimize: bool = True) -> HeadTensors:
    """An exported file in ONNX Runtime, with what it still has of these values as outputs of a copy.

    Args:
        optimize: as of :class:`export.runners.OnnxRuntimeRunner`.
    """
    model = onnx.load(path)
    names = [name for node in model.graph.node for name in node.output if name.startswith(HEAD_PREFIX)]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=usable_providers())
    (images,) = session.get_inputs()

    def run(canvas: np.ndarray) -> dict[str, np.ndarray]:
        values = session.run(names, {images.name: canvas[None]}) if names else []
        return dict(zip(names, values, strict=True))

    return run


def head_differences(rungs: Mapping[str, HeadTensors], canvases: Iterable[np.ndarray]) -> list[HeadDifference]:
    """Compare each rung with the one before it, tensor by tensor and level by level.

    Args:
        rungs: by name, in order. What one of two neighbours does not have is not compared; what one has in another
            shape, as a level of another size, counts as if all of it were wrong.
        canvases: (3, H, W) uint8 each.
    """
    errors: dict[tuple[str, str, str], list[tuple[float, float, float]]] = {}
    for canvas in canvases:
        found = {rung: run(canvas) for rung, run in rungs.items()}
        for before, rung in pairwise(rungs):
            for name in [name for name in found[before] if name in found[rung]]:
                reference = found[before][name].astype(np.float64)
                same_shape = found[rung][name].shape == reference.shape
                error = np.abs(found[rung][name] - reference if same_shape else reference)
                errors.setdefault((rung, before, name), []).append((error.max(), error.mean(), np.abs(reference).max()))
    differences = []
    for (rung, before, name), values in errors.items():
        max_errors, mean_errors, max_values = zip(*values, strict=True)
        tensor, level = name.removeprefix(HEAD_PREFIX).split("/")
        differences.append(
            HeadDifference(
                rung=rung,
                compared_with=before,
                tensor=tensor,
                level=int(level),
                max_abs_error=float(max(max_errors)),
                mean_abs_error=float(np.mean(mean_errors)),
                max_abs_value=float(max(max_values)),
            )
        )
    return differences


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
