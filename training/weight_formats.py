"""Weights of other projects under detectron2's names: its own zoo, Caffe2, torchvision's ResNets, the authors' Swin."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from torch import Tensor

from training.backbones.weight_file import read_weight_file, state_dict_of

_TORCHVISION_NAMES = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What a weight file holds, under detectron2's names.

    Attributes:
        path: the file.
        kind: what the file was taken for, in words.
        tensors: by detectron2's names; those of a backbone have no prefix.
        original: by the file's own names.
        channel_order: ``"RGB"`` or ``"BGR"`` where the kind fixes it.
        unit_deviation: the pixels were divided by nothing; says something only where ``channel_order`` does.
        has_detector_names: the names are a detector's, not those of a backbone or of another project's detector.
    """

    path: Path
    kind: str
    tensors: Mapping[str, Tensor]
    original: Mapping[str, Tensor]
    channel_order: str | None = None
    unit_deviation: bool = False
    has_detector_names: bool = False


def read_weights(path: Path) -> Weights:
    """Read a weight file and name its tensors as detectron2 does.

    Raises:
        WeightsUnusable: it is missing, cannot be read, or holds no tensors.
    """
    content = read_weight_file(path)
    if isinstance(content.get("blobs"), Mapping):
        content = {"model": content["blobs"]}
    state = state_dict_of(content, path)
    if any(key.endswith(("_w", "_bn_s", "_gn_s", "_bn_gamma")) for key in state):
        return _caffe2(state, path)
    if any(key.startswith("backbone.") for key in state):
        return Weights(path=path, kind="detector", tensors=state, original=state, has_detector_names=True)
    if "layer1.0.conv1.weight" in state:
        tensors = torchvision_to_detectron2(state)
        return Weights(path=path, kind="torchvision", tensors=tensors, original=state, channel_order="RGB")
    if "patch_embed.proj.weight" in state and "layers.0.blocks.0.attn.qkv.weight" in state:
        return Weights(path=path, kind="Swin", tensors=_swin(state), original=state, channel_order="RGB")
    order = "RGB" if content.get("__author__") == "torchvision" else None
    return Weights(path=path, kind="detectron2 backbone", tensors=state, original=state, channel_order=order)


def torchvision_to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A torchvision ResNet's or ResNeXt's tensors under detectron2's names, its classifier left out."""
    named = {}
    for key, value in state.items():
        if key.startswith("fc.") or key.endswith(".num_batches_tracked"):
            continue
        for pattern, replacement in _TORCHVISION_NAMES:
            key = re.sub(pattern, replacement, key)
        named[key] = value
    return named


def _caffe2(state: Mapping[str, Tensor], path: Path) -> Weights:
    """Caffe2's names by detectron2's own table. Its ResNets saw BGR pixels as they are, its ResNeXts divided ones."""
    named, _ = convert_c2_detectron_names({k: v for k, v in state.items() if not k.endswith("_momentum")})
    kernel = named.get("res2.0.conv2.weight")
    is_grouped = kernel is not None and kernel.shape[1] < kernel.shape[0]
    return Weights(
        path=path,
        kind="Caffe2",
        tensors=named,
        original=state,
        channel_order="BGR",
        unit_deviation=not is_grouped,
    )


def _swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the classifier, its norm, and the masks of one image size, which detectron2 computes for each."""
    return {
        key: value
        for key, value in state.items()
        if not key.startswith(("head.", "norm.")) and not key.endswith(".attn_mask")
    }
