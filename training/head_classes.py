"""Which tensors of a stock detector depend on its number of classes, and how many classes a checkpoint has."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

_LAST_LAYERS = re.compile(r"\.(cls_score|bbox_pred|predictor)\.(weight|bias)$")


def class_count(student: nn.Module) -> int:
    """Number of object classes that a stock detector was built for."""
    return int(student.num_classes if hasattr(student, "num_classes") else student.roi_heads.num_classes)


def checkpoint_class_count(student: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Number of classes of a checkpoint of the same detector, from the size of its classifier.

    Args:
        student: the detector, built for any number of classes.
        state: the checkpoint's tensors under the detector's names.

    Returns:
        None when the classifier is missing or its size is none that this detector can have.
    """
    for key, value in student.state_dict().items():
        if not key.endswith("cls_score.bias"):
            continue
        found = state.get(key)
        if found is None or found.ndim != 1:
            return None
        if key.startswith("roi_heads."):  # one output more, for the background
            return len(found) - 1
        num_anchors = len(value) // class_count(student)
        return len(found) // num_anchors if len(found) % num_anchors == 0 else None
    return None


def class_dependent(student: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Keys of ``state`` whose shapes differ from the detector's by the number of classes alone."""
    theirs = checkpoint_class_count(student, state)
    if not theirs:
        return []
    ours, found = class_count(student), []
    for key, target in student.state_dict().items():
        if not _LAST_LAYERS.search(key) or key not in state or state[key].shape == target.shape:
            continue
        with_background = key.startswith("roi_heads.") and "cls_score" in key
        expected = theirs + 1 if with_background else len(target) // ours * theirs
        if state[key].shape == (expected, *target.shape[1:]):
            found.append(key)
    return found
