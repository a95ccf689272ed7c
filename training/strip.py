"""Drop everything but the student, and prove that nothing else was left or changed."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.checkpoint import load_strictly, load_student, read_checkpoint, student_state, write_atomically
from training.distilled_detector import DistilledDetector
from training.schedule import DistillationSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a checkpoint: its name, number of parameters and size."""

    part: str
    num_parameters: int
    size_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StripProof:
    """What was compared between the training checkpoint and the student checkpoint.

    Attributes:
        num_tensors: tensors of the student, each compared byte for byte.
        tensors_identical: all of them are.
        keys_are_stock: the student's keys are exactly those of the stock detector.
        num_teacher_tensors_in_student: tensors of the distiller found, by content, in the student checkpoint.
        num_probe_images: images on which the outputs were compared.
        max_abs_difference: between the outputs of the training module in eval mode and of the stripped student.
        kept, removed: sizes of what ships and of what is gone.
        removed_tensor_digests: SHA-256 of each removed tensor, for the same search in exported models.
    """

    num_tensors: int
    tensors_identical: bool
    keys_are_stock: bool
    num_teacher_tensors_in_student: int
    num_probe_images: int
    max_abs_difference: float
    kept: Part
    removed: tuple[Part, ...]
    removed_tensor_digests: tuple[str, ...]


def strip(
    checkpoint: Path,
    student_checkpoint: Path,
    *,
    student: nn.Module,
    distiller: nn.Module,
    probe_inputs: list[dict[str, Any]],
) -> StripProof:
    """Write ``{"model": student}`` of ``checkpoint`` to ``student_checkpoint`` and prove it.

    Args:
        student: a stock detector of the recipe; loaded here.
        distiller: the training run's distiller; loaded here, to run the training module beside the stripped student.
        probe_inputs: detectron2 inputs (``{"image": ...}``) on which both must agree.

    Raises:
        CheckpointDamaged: the checkpoint lacks the student or does not fit the detector.
    """
    content = read_checkpoint(checkpoint)
    # Training works in channels-last; what ships is laid out as any other checkpoint.
    trained: dict[str, Tensor] = {
        key: tensor.contiguous() for key, tensor in student_state(content, checkpoint).items()
    }
    removed: dict[str, Tensor] = content.get("distiller", {})
    write_atomically({"model": trained}, student_checkpoint)

    keys_are_stock = set(student.state_dict()) == set(trained)
    unstripped = load_strictly(copy.deepcopy(student), trained, checkpoint)
    load_strictly(distiller, removed, checkpoint)
    training_module = DistilledDetector(unstripped, distiller, DistillationSchedule()).eval()
    stripped = load_student(student, student_checkpoint)
    shipped = read_checkpoint(student_checkpoint)["model"]
    digests = _digests(removed.values())
    return StripProof(
        num_tensors=len(shipped),
        tensors_identical=all(tensor_digest(trained[key]) == tensor_digest(shipped[key]) for key in trained),
        keys_are_stock=keys_are_stock,
        num_teacher_tensors_in_student=len(digests & _digests(shipped.values())),
        num_probe_images=len(probe_inputs),
        max_abs_difference=_max_abs_difference(training_module, stripped, probe_inputs),
        kept=_part("student", shipped),
        removed=tuple(_parts(removed)),
        removed_tensor_digests=tuple(sorted(digests)),
    )


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values in memory order."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _digests(tensors: Iterable[Tensor]) -> set[str]:
    # A constant tensor (zeros, ones) is equal to others by chance and proves nothing.
    return {tensor_digest(t) for t in tensors if t.numel() > 1 and bool((t != t.flatten()[0]).any())}


def _part(name: str, tensors: dict[str, Tensor]) -> Part:
    return Part(
        part=name,
        num_parameters=sum(t.numel() for t in tensors.values()),
        size_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
    )


def _parts(tensors: dict[str, Tensor]) -> list[Part]:
    """The distiller by its modules: the adapter as one part, the implicit teacher by its own modules."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        head, *rest = key.split(".")
        name = f"{head}.{rest[0]}" if len(rest) > 2 and head == "implicit_teacher" else head
        groups.setdefault(name, {})[key] = tensor
    return [_part(name, group) for name, group in groups.items()]


@torch.inference_mode()
def _max_abs_difference(first: nn.Module, second: nn.Module, inputs: list[dict[str, Any]]) -> float:
    """Largest difference of boxes, scores or pixels of masks; infinite where number, order or classes differ."""
    largest = 0.0
    for probe in inputs:
        a, b = first([probe])[0]["instances"], second([probe])[0]["instances"]
        if len(a) != len(b) or not torch.equal(a.pred_classes, b.pred_classes):
            return float("inf")
        if len(a):
            largest = max(
                largest,
                float((a.pred_boxes.tensor - b.pred_boxes.tensor).abs().max()),
                float((a.scores - b.scores).abs().max()),
            )
        if len(a) and a.has("pred_masks"):
            largest = max(largest, float((a.pred_masks ^ b.pred_masks).any()))
    return largest
