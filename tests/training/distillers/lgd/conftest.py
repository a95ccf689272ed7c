"""What the tests of LGD share: labels, features, and the rule that makes the recorded reference's parameters."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

REFERENCE_PREFIXES = {
    "label_encoder.local.0.matrix.0": "label_encoder_.stn_desc.conv1",
    "label_encoder.local.0.matrix.1": "label_encoder_.stn_desc.conv2",
    "label_encoder.local.0.matrix.2": "label_encoder_.stn_desc.conv3",
    "label_encoder.local.0.matrix.3": "label_encoder_.stn_desc.fc1",
    "label_encoder.local.0.matrix.4": "label_encoder_.stn_desc.fc2",
    "label_encoder.local.0.matrix.5": "label_encoder_.stn_desc.fc3",
    "label_encoder.local.1": "label_encoder_.conv1",
    "label_encoder.local.2.matrix.0": "label_encoder_.stn_feat.conv1",
    "label_encoder.local.2.matrix.1": "label_encoder_.stn_feat.conv2",
    "label_encoder.local.2.matrix.2": "label_encoder_.stn_feat.conv3",
    "label_encoder.local.2.matrix.3": "label_encoder_.stn_feat.fc1",
    "label_encoder.local.2.matrix.4": "label_encoder_.stn_feat.fc2",
    "label_encoder.local.2.matrix.5": "label_encoder_.stn_feat.fc3",
    "label_encoder.wide.0": "label_encoder_.conv2",
    "label_encoder.wide.1": "label_encoder_.conv3",
    "label_encoder.embedding": "label_encoder_.conv4",
    "appearance_encoder.projection": "student_proj_2D.0.0",
    "relation_adapter.label_projection": "canoni_proj_1D.0.0",
    "relation_adapter.attention.out_proj": "multi_head_attn.out_proj",
    "knowledge_mapper.object_projection": "local_inst_proj_1D",
    "knowledge_mapper.context_projection": "global_ctx_proj_1D",
    "knowledge_mapper.spread": "local_inst_proj_2D",
    "knowledge_mapper.refinement.0": "refinement_module.0",
    "knowledge_mapper.refinement.1": "refinement_module.3",
    "knowledge_mapper.refinement.2": "refinement_module.6",
}
"""Where a part of `ImplicitTeacher` is called in the reference code."""


def reference_name(name: str) -> str:
    """The reference's name of a parameter of `LabelGuidedDistiller`."""
    if name.startswith("adapter."):
        return name
    name = name.removeprefix("implicit_teacher.")
    if name.startswith("relation_adapter.attention.in_proj_"):
        return name.replace("relation_adapter.attention", "multi_head_attn")
    part, _, kind = name.rpartition(".")
    return f"{REFERENCE_PREFIXES[part]}.{kind}"


def parameter_by_rule(name: str, shape: Sequence[int]) -> Tensor:
    """The values of the reference's parameter of this name: seeded by the name, so that none are stored."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    scale = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
    return torch.from_numpy((random.standard_normal(tuple(shape)) * scale).astype(np.float32))


def fill_by_rule(distiller: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in distiller.named_parameters():
            parameter.copy_(parameter_by_rule(reference_name(name), parameter.shape))


def labels(boxes: Any, classes: Any, size: tuple[int, int] = (128, 128)) -> Instances:
    return Instances(
        size,
        gt_boxes=Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.as_tensor(classes, dtype=torch.int64),
    )


@pytest.fixture(scope="session", name="labels")
def _labels() -> Callable[..., Instances]:
    return labels


@pytest.fixture(scope="session", name="fill_by_rule")
def _fill_by_rule() -> Callable[[nn.Module], None]:
    return fill_by_rule


@pytest.fixture(scope="session", name="reference_name")
def _reference_name() -> Callable[[str], str]:
    return reference_name
