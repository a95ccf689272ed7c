"""A whole detector's checkpoint that was trained elsewhere: it fits the stock detector exactly, or it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from training.backbones.weight_file import WeightsUnusable, first_names
from training.divergence import names_not_finite
from training.head_classes import checkpoint_class_count, class_count
from training.initial_weights import DERIVED, REFERENCE_HINT
from training.weight_formats import read_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """The recipe's ``training`` section of a model that was trained elsewhere.

    Attributes:
        checkpoint: the file it is imported from, once: what is imported stays in the run.
        sha256: of that file.
        class_names: of each label, where no data set is named.
        category_ids: of each label, where no data set is named.
        class_names_from: what said the names; for people.
        device: where the detector is evaluated.
    """

    checkpoint: Path
    sha256: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    class_names_from: str
    device: Literal["auto", "cpu", "cuda"] = "auto"


def imported_state(detector: nn.Module, path: Path) -> dict[str, Tensor]:
    """The detector's whole state dict from a checkpoint, which is read without running code from it.

    Tensors that follow from the architecture may be missing, and those that detectron2 once kept in checkpoints and
    now derives from the configuration (pixel means, cell anchors) may be there, with the detector's own values.

    Args:
        detector: for names, shapes and derived tensors; stays as it is.
        path: a ``.pth``, ``.pkl`` or ``.safetensors`` file with detectron2's names.

    Raises:
        WeightsUnusable: it cannot be read, or a tensor is missing, has no place, has another shape or is not finite.
    """
    weights = read_weights(path)
    target, found = detector.state_dict(), dict(weights.tensors)
    if not set(found) & set(target):
        hint = REFERENCE_HINT if any(key.startswith("student.") for key in weights.original) else ""
        raise WeightsUnusable(
            f"{path}: none of its {len(found)} tensors ({first_names(weights.original)}) is one of the detector's "
            f"({first_names(target)}); give the checkpoint of a whole detector under detectron2's names{hint}"
        )
    _check_derived(detector, target, found, path)
    unused = [key for key in found if key not in target and not _is_derived(key)]
    missing = [key for key in target if key not in found and not _is_derived(key)]
    wrong = [key for key in target if key in found and found[key].shape != target[key].shape]
    if missing or unused or wrong:
        raise WeightsUnusable(_misfit(detector, path, found, missing, unused, wrong))
    state = {key: found.get(key, value).to(value.dtype).contiguous() for key, value in target.items()}
    if not_finite := names_not_finite(state):
        raise WeightsUnusable(f"{path}: {len(not_finite)} tensors are not finite: {first_names(not_finite)}")
    return state


def _is_derived(key: str) -> bool:
    return key.endswith(DERIVED)


def _check_derived(detector: nn.Module, target: Mapping[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    """Take the detector's derived buffers out of ``found``, where their values are the detector's own."""
    for key, ours in detector.named_buffers():
        if key in target or key not in found:
            continue
        theirs = found.pop(key).to(ours.dtype)
        if theirs.numel() != ours.numel() or not torch.allclose(theirs.flatten(), ours.flatten().cpu(), rtol=1e-3):
            raise WeightsUnusable(
                f"{path} was trained with {key} {_values(theirs)}, and the configuration says {_values(ours)}; give "
                "the configuration that it was trained with, or override what differs"
            )


def _misfit(
    detector: nn.Module,
    path: Path,
    found: Mapping[str, Tensor],
    missing: list[str],
    unused: list[str],
    wrong: list[str],
) -> str:
    target = detector.state_dict()
    shapes = [f"{key} {tuple(found[key].shape)}, expected {tuple(target[key].shape)}" for key in wrong]
    told = [
        f"{len(names)} {what}: {first_names(names)}"
        for what, names in (
            (f"of the detector's {len(target)} tensors are missing", missing),
            ("have another shape", shapes),
            ("have no place in it", unused),
        )
        if names
    ]
    theirs, ours = checkpoint_class_count(detector, found), class_count(detector)
    classes = f" It has {theirs} classes and the configuration {ours}." if theirs and theirs != ours else ""
    return (
        f"{path} does not fit the detector: {'; '.join(told)}.{classes} Give the configuration that it was trained with"
    )


def _values(tensor: Tensor) -> list[float]:
    return [round(value, 3) for value in tensor.flatten().tolist()[:6]]
