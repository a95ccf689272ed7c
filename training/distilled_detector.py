"""A stock detector and its distiller as one module that turns a batch into named losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from training.detection_losses import (
    detection_losses,
    distilled_levels,
    label_assignment,
    loss_normalizer,
    same_loss_normalizer,
    set_loss_normalizer,
)
from training.schedule import DistillationSchedule


class DistilledDetector(nn.Module):
    """What the training loop sees: the student's losses and the distiller's, added by name.

    The student is any stock detectron2 meta-architecture and knows nothing of this. In eval mode the module is the
    student.

    Args:
        student: the detector that ships.
        distiller: called with ``features, gt_instances, padded_size, distill, teacher_losses``; returns named losses to
            add. ``teacher_losses(features, trains_head)`` runs the student's own head and losses on a pyramid that the
            distiller made, and says whether the head learns from them. Its ``teacher_parameters()`` are those that
            ``training.teacher_optimizer`` trains.
        schedule: when distillation acts.
    """

    def __init__(self, student: nn.Module, distiller: nn.Module, schedule: DistillationSchedule) -> None:
        super().__init__()
        self.student = student
        self.distiller = distiller
        self.schedule = schedule
        self.iteration = 0

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training mode; the student's own detections in eval mode."""
        if not self.training:
            return self.student(batched_inputs)
        student, phase = self.student, self.schedule.phase(self.iteration)
        batched_inputs = on_device(batched_inputs, next(student.parameters()).device)
        images = student.preprocess_image(batched_inputs)
        with without_bottom_up_gradient(student) if phase.freeze_backbone else nullcontext():
            features = student.backbone(images.tensor)
        gt_instances = [x["instances"] for x in batched_inputs]
        before = loss_normalizer(student)
        assigned = label_assignment(student, features, gt_instances)
        losses = dict(detection_losses(student, images, features, gt_instances, assigned))

        def teacher_losses(teacher_features: dict[str, Tensor], trains_head: bool) -> dict[str, Tensor]:
            head_gradient = nullcontext() if trains_head else without_head_gradient(student)
            with same_loss_normalizer(student, before), head_gradient, counted_apart():
                return detection_losses(student, images, {**features, **teacher_features}, gt_instances, assigned)

        losses |= self.distiller(
            features={level: features[level] for level in distilled_levels(student)},
            gt_instances=gt_instances,
            padded_size=tuple(images.tensor.shape[-2:]),
            distill=phase.distill,
            teacher_losses=teacher_losses,
        )
        return losses


class DistillationHook(HookBase):
    """Keeps the module's iteration, and carries the loss normaliser, which detectron2 keeps outside the state dict,
    through checkpoints."""

    def __init__(self, detector: DistilledDetector) -> None:
        self._detector = detector

    def before_step(self) -> None:
        self._detector.iteration = self.trainer.iter

    def state_dict(self) -> dict[str, Any]:
        return {"loss_normalizer": loss_normalizer(self._detector.student)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_loss_normalizer(self._detector.student, state_dict["loss_normalizer"])


def counted_apart() -> AbstractContextManager[None]:
    """Put what a detector counts of its own, such as its accuracy on proposals, under ``teacher/``.

    A second pass would otherwise write its numbers over those of the student, under the same names.
    """
    return get_event_storage().name_scope("teacher") if has_event_storage() else nullcontext()


def bottom_up(student: nn.Module) -> nn.Module:
    """The network below the pyramid; the whole backbone where there is no pyramid."""
    return getattr(student.backbone, "bottom_up", student.backbone)


@contextmanager
def without_bottom_up_gradient(student: nn.Module) -> Iterator[None]:
    """Run the network below the pyramid without recording a gradient, and the pyramid itself with one.

    No gradient is computed to be thrown away. As its parameters have none, neither momentum nor weight decay moves
    them, and DDP treats them as unused. Batch statistics are gathered as ever.

    Deviation: the reference computes the gradients and then drops them, with the same effect.
    """
    network = bottom_up(student)
    if network is student.backbone:
        with torch.no_grad():
            yield
        return

    def without_gradient(images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            features: dict[str, Tensor] = network(images)
        return features

    # An attribute of the instance hides the submodule of that name. A hook would go unnoticed by compiled code.
    vars(student.backbone)["bottom_up"] = without_gradient
    try:
        yield
    finally:
        del vars(student.backbone)["bottom_up"]


@contextmanager
def without_head_gradient(student: nn.Module) -> Iterator[None]:
    """Run the student above the pyramid without recording a gradient of its parameters; that of its input is kept."""
    of_head = [p for name, p in student.named_parameters() if not name.startswith("backbone.") and p.requires_grad]
    for parameter in of_head:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in of_head:
            parameter.requires_grad_(True)


def on_device(batched_inputs: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Images and labels on ``device``, sent without waiting for them; what is there already is not copied."""
    return [
        {
            **given,
            "image": given["image"].to(device, non_blocking=True),
            "instances": _instances_on(given["instances"], device),
        }
        for given in batched_inputs
    ]


def _instances_on(instances: Instances, device: torch.device) -> Instances:
    moved = Instances(instances.image_size)
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):  # its own `to` knows no non_blocking
            value = Boxes(value.tensor.to(device, non_blocking=True))
        elif hasattr(value, "to"):  # tensors and bit masks; polygons stay lists
            value = value.to(device, non_blocking=True)
        moved.set(name, value)
    return moved
