"""From a checkpoint of the LGD reference code (megvii-research/LGD) to a student checkpoint.

The reference keeps the network below the pyramid apart from the pyramid and saves the pyramid twice:

    student.raw_backbone.X    backbone.bottom_up.X
    student.backbone.X        backbone.X
    student.fpn.X             the same tensors as student.backbone.X
    student.X                 X
    teacher.X, adapter.X      dropped
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from training.backbones.weight_file import WeightsUnusable, first_names, read_weight_file, state_dict_of
from training.checkpoint import write_atomically
from training.head_classes import checkpoint_class_count, class_count

_PREFIXES = (
    ("student.raw_backbone.", "backbone.bottom_up."),
    ("student.backbone.", "backbone."),
    ("student.fpn.", "backbone."),
    ("student.", ""),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors of one part of the reference's module."""

    part: str
    num_tensors: int
    num_parameters: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceStudent:
    """What became of a reference checkpoint.

    Attributes:
        num_classes: that the checkpoint's classifier has.
        kept: parts of the student, by its own modules.
        dropped: what does not ship, by the reference's modules; second copies and constants that follow from the
            recipe are among them.
    """

    num_classes: int
    kept: tuple[TensorGroup, ...]
    dropped: tuple[TensorGroup, ...]


def student_from_reference(
    checkpoint: Path, student_checkpoint: Path, *, build: Callable[[int], nn.Module]
) -> ReferenceStudent:
    """Write the student of a reference checkpoint as ``{"model": ...}`` under stock keys.

    Args:
        checkpoint: of the reference code; read without running code from it.
        student_checkpoint: written whole or not at all.
        build: makes the stock detector for a number of classes.

    Raises:
        WeightsUnusable: the checkpoint cannot be read, is none of the reference code, or its student is not exactly the
            recipe's: another architecture, other pixel statistics or other anchors.
    """
    state = state_dict_of(read_weight_file(checkpoint), checkpoint)
    named, dropped = _stock_names(state, checkpoint)
    student = build(1)
    num_classes = checkpoint_class_count(student, named)
    if not num_classes:
        parts = sorted({key.rpartition(".")[0] for key in named if not key.startswith("backbone.")})
        raise WeightsUnusable(
            f"{checkpoint}: no classifier of the recipe's detector ({type(student).__name__}) is in it, only "
            f"{first_names(parts)}. Give the recipe of the detector that it was trained as"
        )
    if num_classes != class_count(student):
        student = build(num_classes)
    constants = _checked_constants(student, named, checkpoint)
    kept = {key: value.contiguous() for key, value in named.items() if key not in constants}
    _check_exact(student, kept, checkpoint)
    student_checkpoint.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({"model": kept}, student_checkpoint)
    for key in constants:
        dropped.setdefault("constants of the recipe", {})[key] = constants[key]
    return ReferenceStudent(
        num_classes=num_classes,
        kept=_groups(kept, student.state_dict()),
        dropped=tuple(_group(part, tensors) for part, tensors in sorted(dropped.items())),
    )


def _stock_names(state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The student's tensors under stock names, and everything else by part."""
    if not any(key.startswith("student.") for key in state):
        hint = "; a detectron2 detector's goes into training.init_checkpoint" if "backbone." in "".join(state) else ""
        raise WeightsUnusable(
            f"{path} is no checkpoint of the LGD reference code: expected keys student.raw_backbone.*, found "
            f"{first_names(state)}{hint}"
        )
    named: dict[str, Tensor] = {}
    dropped: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        found = next(((old, new) for old, new in _PREFIXES if key.startswith(old)), None)
        if found is None:
            dropped.setdefault(key.partition(".")[0], {})[key] = value
            continue
        old, new = found
        name = new + key.removeprefix(old)
        if name in named:
            if not torch.equal(named[name], value):
                raise WeightsUnusable(
                    f"{path}: {key} and its second copy differ, so it is unclear which was trained; the file is "
                    "damaged or was changed after training"
                )
            dropped.setdefault("second copy of the pyramid", {})[key] = value
        else:
            named[name] = value
    return named, dropped


def _checked_constants(student: nn.Module, named: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors that detectron2 once saved and now derives from the recipe: pixel statistics and anchors.

    Their values must be the recipe's, or the student would see other pixels than it was trained on.
    """
    stock = set(student.state_dict())
    derived = {name: buffer for name, buffer in student.named_buffers() if name not in stock}
    constants = {key: value for key, value in named.items() if key in derived}
    for key, value in constants.items():
        expected = derived[key]
        if value.shape != expected.shape or not torch.allclose(value.float(), expected.float(), atol=1e-3):
            raise WeightsUnusable(
                f"{path} was trained with {key} {_values(value)}, the recipe has {_values(expected)}; change the "
                f"recipe's model.{key.partition('.')[0]}"
            )
    return constants


def _check_exact(student: nn.Module, kept: Mapping[str, Tensor], path: Path) -> None:
    stock = student.state_dict()
    missing = [key for key in stock if key not in kept]
    unexpected = [key for key in kept if key not in stock]
    wrong = [key for key in kept if key in stock and kept[key].shape != stock[key].shape]
    problems = []
    if missing:
        problems.append(f"lacks {first_names(missing)}")
    if unexpected:
        problems.append(f"has {first_names(unexpected)}, which the recipe's model has not")
    problems += [f"{key} has shape {tuple(kept[key].shape)}, expected {tuple(stock[key].shape)}" for key in wrong[:3]]
    if problems:
        raise WeightsUnusable(
            f"{path}: its student is not the recipe's ({len(missing)} tensors missing, {len(unexpected)} unexpected, "
            f"{len(wrong)} of another shape): {'; '.join(problems)}. Give the recipe of the detector and backbone that "
            "it was trained with"
        )
    broken = [key for key, value in kept.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise WeightsUnusable(
            f"{path}: {first_names(broken)} holds NaN or infinity; the training that wrote it diverged"
        )


def _groups(kept: Mapping[str, Tensor], order: Iterable[str]) -> tuple[TensorGroup, ...]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key in order:
        first, *rest = key.split(".")
        part = f"{first}.{rest[0]}" if first == "backbone" and rest[0] == "bottom_up" else first
        parts.setdefault("pyramid" if part == "backbone" else part, {})[key] = kept[key]
    return tuple(_group(part, tensors) for part, tensors in parts.items())


def _group(part: str, tensors: Mapping[str, Tensor]) -> TensorGroup:
    return TensorGroup(
        part=part, num_tensors=len(tensors), num_parameters=sum(value.numel() for value in tensors.values())
    )


def _values(tensor: Tensor) -> list[float]:
    return [round(value, 3) for value in tensor.flatten().tolist()[:12]]
