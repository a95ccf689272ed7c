"""Checkpoints that are whole or absent, with the student apart from everything that is thrown away."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from training.backbones.weight_file import first_names
from training.divergence import diverged, names_not_finite

FINAL_CHECKPOINT = "model_final.pth"


class CheckpointDamaged(ValueError):
    """A checkpoint cannot be read, or does not hold what its name promises."""

    exit_code = 5


class StudentCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer with writes that a ``kill -9`` or a full disk cannot leave half done.

    ``model`` is the student alone, under its stock keys, as it is evaluated and shipped; the distiller and the trainer
    are named extras. With ``training.ema_decay`` ``model`` is the average, and the weights that are trained are one
    more extra, ``student_without_average``.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint.

        Raises:
            LossNotFinite: something in it is infinite or NaN; nothing is written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {
            "model": self.model.state_dict(),
            **{key: obj.state_dict() for key, obj in self.checkpointables.items()},
        }
        data |= kwargs
        not_finite = names_not_finite(data)
        if not_finite:
            raise diverged(f"after iteration {kwargs.get('iteration', '?')} {first_names(not_finite)} are not finite")
        directory = Path(self.save_dir)
        write_atomically(data, directory / f"{name}.pth")
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        tag = Path(self.save_dir) / "last_checkpoint"
        partial = tag.with_suffix(".partial")
        partial.write_text(last_filename_basename)
        os.replace(partial, tag)


def write_atomically(data: dict[str, Any], path: Path) -> None:
    """``torch.save`` to a temporary file beside ``path``, flushed to the disk, then renamed."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as stream:
            torch.save(data, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's content, read without running code from it (``weights_only=True``).

    Raises:
        CheckpointDamaged: it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointDamaged(
            f"{path} cannot be read as a checkpoint: {error}. It is damaged or not a PyTorch file; "
            "train again with --force"
        ) from error


def load_student(student: nn.Module, path: Path) -> nn.Module:
    """Load a student checkpoint strictly into a stock detector and return it in eval mode.

    Raises:
        CheckpointDamaged: keys or shapes differ from the detector's.
    """
    return load_strictly(student, student_state(read_checkpoint(path), path), path).eval()


def student_state(checkpoint: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The student's part of a checkpoint; ``path`` is for the message."""
    state = checkpoint.get("model")
    if not isinstance(state, dict):
        raise CheckpointDamaged(
            f"{path} has no entry 'model', so there is no student in it; a student checkpoint is "
            "{'model': state dict}. Train again with --force"
        )
    return state


def load_strictly(module: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """``load_state_dict`` with the file in the message when keys or shapes differ."""
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointDamaged(f"{path} does not fit the recipe's model: {error}") from error
    return module
