"""Put the weights that ``training.init_checkpoint`` names into a student, or refuse them before training starts.

A source is a file or a detectron2 zoo address. It holds a whole detector, or a backbone in any of the forms that
``training.weight_formats`` knows; for a timm backbone, timm's own form.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from training.backbones.timm_backbone import TimmBackbone, fitted_weights
from training.backbones.weight_file import WeightsUnusable, first_names
from training.distilled_detector import bottom_up
from training.head_classes import checkpoint_class_count, class_count, class_dependent
from training.weight_formats import Weights, read_weights

_STATISTICS = (".running_mean", ".running_var")
# Buffers that follow from the architecture, or counters that nothing reads.
DERIVED = (".num_batches_tracked", ".relative_position_index", ".relative_coords_table")
_CLASSIFIERS = ("fc.", "fc1000.", "linear.", "pred.", "head.", "norm.", "classifier.")
REFERENCE_HINT = ", or, for a checkpoint of the LGD reference code, `python -m pipeline student-from-reference` first"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The tensors to load by the student's keys, and what the user is told."""

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def load_initial_weights(student: nn.Module, source: str) -> None:
    """Load a source into a student; tensors that it does not hold keep their random initialisation.

    Args:
        student: a stock detector.
        source: ``detectron2://...`` or another address that detectron2 can fetch, or a path.

    Raises:
        WeightsUnusable: the source cannot be fetched or read, belongs to another architecture, or has tensors of other
            shapes; the student is unchanged.
    """
    plan = _plan(student, source)
    # detectron2's frozen norm takes 1 for a variance that a state dict lacks, where its own start is 1 - eps.
    statistics = {key: value for key, value in student.state_dict().items() if key.endswith(_STATISTICS)}
    student.load_state_dict(statistics | dict(plan.tensors), strict=False)
    for note in plan.notes:
        logger.info("%s", note)
    for warning in plan.warnings:
        logger.warning("%s", warning)


def check_initial_weights(student: nn.Module, source: str) -> None:
    """Refuse what :func:`load_initial_weights` would refuse; the student stays as it is.

    Raises:
        WeightsUnusable: as there.
    """
    _plan(student, source)


def _plan(student: nn.Module, source: str) -> _Plan:
    weights = read_weights(_local_file(source))
    target = student.state_dict()
    placed, unused = _placed(student, weights)
    if not placed:
        raise WeightsUnusable(
            f"training.init_checkpoint={source}: none of its {len(weights.tensors)} tensors (of kind {weights.kind}; "
            f"{first_names(weights.original)}) belongs to the student ({first_names(target)}); use weights of this "
            "architecture" + (REFERENCE_HINT if any(key.startswith("student.") for key in weights.original) else "")
        )
    left_out = class_dependent(student, placed)
    wrong = [key for key in placed if placed[key].shape != target[key].shape and key not in left_out]
    if wrong:
        key = wrong[0]
        raise WeightsUnusable(
            f"training.init_checkpoint={source}: {key} has shape {tuple(placed[key].shape)}, expected "
            f"{tuple(target[key].shape)} ({len(wrong)} of {len(placed)} tensors differ); use weights of this "
            "architecture, or change the recipe's model"
        )
    missing = [key for key in target if key not in placed]
    absent = _required(student, missing, placed)
    if absent:
        folded = all(key.endswith(_STATISTICS) for key in absent)
        raise WeightsUnusable(
            f"training.init_checkpoint={source} lacks {len(absent)} of the backbone's tensors: {first_names(absent)}. "
            + (
                "Its norms are folded into scales: use norm='FrozenBN'"
                if folded
                else "Use weights of this architecture"
            )
        )
    notes = [f"{source}: {len(placed) - len(left_out)} tensors loaded (kind {weights.kind})"]
    if left_out:
        notes.append(
            f"left at random initialisation, because the checkpoint has {checkpoint_class_count(student, placed)} "
            f"classes and the data set {class_count(student)}: {', '.join(left_out)}"
        )
    random = [key for key in missing if not key.endswith(DERIVED + _STATISTICS)]
    if random:
        notes.append(f"not in the checkpoint, left at their initialisation: {first_names(random, 8)}")
    return _Plan(
        tensors={key: value for key, value in placed.items() if key not in left_out},
        notes=tuple(notes),
        warnings=tuple(_warnings(student, weights, unused)),
    )


def _local_file(source: str) -> Path:
    if "://" not in source:
        return Path(source)
    try:
        return Path(PathManager.get_local_path(source))
    except Exception as error:  # each of iopath's handlers fails in its own way
        raise WeightsUnusable(
            f"training.init_checkpoint={source} could not be fetched: {' '.join(str(error).split())}. Where this "
            "machine has no network, fetch the file elsewhere and give its path: training.init_checkpoint=/path/to/file"
        ) from error


def _placed(student: nn.Module, weights: Weights) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors by the student's keys, and the names that have no place in it.

    A detector's names are the student's own. Otherwise a tensor goes where its name ends the student's key, the longest
    such name first, as detectron2's own matching does.
    """
    target = student.state_dict()
    network = bottom_up(student)
    if weights.has_detector_names:
        known = {name for name, _ in student.named_buffers()}  # those that checkpoints no longer hold, too
        unused = [key for key in weights.tensors if key not in target and key not in known]
        return {key: value for key, value in weights.tensors.items() if key in target}, unused
    if isinstance(network, TimmBackbone):
        fitted = fitted_weights(network.body, weights.original, weights.path, network.name)
        prefix = _bottom_up_prefix(student) + "body."
        return {prefix + key: value for key, value in fitted.items()}, []
    placed: dict[str, Tensor] = {}
    used: dict[str, str] = {}
    for key in target:
        parts = key.split(".")
        name = next((n for i in range(len(parts)) if (n := ".".join(parts[i:])) in weights.tensors), None)
        if name is None:
            continue
        if name in used:
            raise WeightsUnusable(
                f"{weights.path}: {name} would fit both {used[name]} and {key} of the student; the file is of another "
                "architecture"
            )
        used[name] = key
        placed[key] = weights.tensors[name]
    return placed, [key for key in weights.tensors if key not in used and not key.startswith(_CLASSIFIERS)]


def _required(student: nn.Module, missing: Iterable[str], placed: Mapping[str, Tensor]) -> list[str]:
    """Tensors of the backbone that weights of the same architecture would hold."""
    prefix = _bottom_up_prefix(student)
    modules = dict(student.named_modules())
    has_statistics = any(key.endswith(_STATISTICS) for key in placed)
    plain = not any(".conv2_offset." in key for key in placed)
    num_swin_norms = sum(key.startswith(f"{prefix}norm") for key in placed)
    required = []
    for key in missing:
        name = key.removeprefix(prefix)
        if name == key or key.endswith(DERIVED):
            continue
        if plain and ".conv2_offset." in key:  # weights of the plain network start a deformable one
            continue
        if num_swin_norms == 0 and name.startswith("norm"):  # a classifier's weights have none of the outputs' norms
            continue
        # Caffe2's statistics are folded into the scales; only a frozen norm can do without.
        frozen = isinstance(modules[key.rpartition(".")[0]], FrozenBatchNorm2d)
        if key.endswith(_STATISTICS) and frozen and not has_statistics:
            continue
        required.append(key)
    return required


def _warnings(student: nn.Module, weights: Weights, unused: list[str]) -> Iterable[str]:
    """What will train worse than it could, though every shape fits."""
    order, deviation = student.input_format, student.pixel_std.flatten()
    is_unit = bool((deviation == 1).all())
    recipe = (
        f"the student has model.input_format={order} and model.pixel_std={[round(v, 3) for v in deviation.tolist()]}"
    )
    if weights.channel_order and (order, is_unit) != (weights.channel_order, weights.unit_deviation):
        divided = "not divided" if weights.unit_deviation else "divided by their deviation"
        yield (
            f"{weights.path} is of kind {weights.kind}, trained on {weights.channel_order} pixels {divided}; {recipe}. "
            "Set model.input_format, model.pixel_mean and model.pixel_std to what the weights were trained with"
        )
    for name in ("pixel_mean", "pixel_std"):
        theirs = weights.tensors.get(name)
        if theirs is not None and not torch.allclose(theirs.flatten().float(), getattr(student, name).flatten()):
            yield f"{weights.path} was trained with {name} {theirs.flatten().tolist()}, and {recipe}. Set model.{name}"
    block = next(iter(getattr(bottom_up(student), "res3", ())), None)
    if weights.kind == "torchvision" and isinstance(block, BottleneckBlock) and max(block.conv1.stride) > 1:
        yield (
            f"{weights.path} is of kind torchvision, whose blocks have their stride in the 3x3 convolution; the "
            "student has it in the first 1x1. Build the backbone with stride_in_1x1=False"
        )
    if unused:
        yield f"{weights.path}: {len(unused)} tensors have no place in the student: {first_names(unused)}"


def _bottom_up_prefix(student: nn.Module) -> str:
    return "backbone.bottom_up." if hasattr(student.backbone, "bottom_up") else "backbone."
