"""A stock detector and its distiller as one module that turns a batch into named losses."""

from __future__ import annotations

from typing import Any

from detectron2.engine import HookBase
from torch import Tensor, nn

from training.detection_losses import (
    detection_losses,
    distilled_levels,
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
            add. ``teacher_losses`` runs the student's own head and losses on a pyramid that the distiller made. Its
            ``teacher_parameters()`` are those that ``training.teacher_optimizer`` trains.
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
        student = self.student
        images = student.preprocess_image(batched_inputs)
        features = student.backbone(images.tensor)
        gt_instances = [x["instances"].to(images.device) for x in batched_inputs]
        before = loss_normalizer(student)
        losses = dict(detection_losses(student, images, features, gt_instances))

        def teacher_losses(teacher_features: dict[str, Tensor]) -> dict[str, Tensor]:
            with same_loss_normalizer(student, before):
                return detection_losses(student, images, {**features, **teacher_features}, gt_instances)

        losses |= self.distiller(
            features={level: features[level] for level in distilled_levels(student)},
            gt_instances=gt_instances,
            padded_size=tuple(images.tensor.shape[-2:]),
            distill=self.schedule.phase(self.iteration).distill,
            teacher_losses=teacher_losses,
        )
        return losses


class DistillationHook(HookBase):
    """Keeps the module's iteration, freezes the bottom-up network while the schedule says so, and carries the loss
    normaliser, which detectron2 keeps outside the state dict, through checkpoints."""

    def __init__(self, detector: DistilledDetector) -> None:
        self._detector = detector

    def before_step(self) -> None:
        self._detector.iteration = self.trainer.iter

    def after_backward(self) -> None:
        if self._detector.schedule.phase(self.trainer.iter).freeze_backbone:
            # Gradients are dropped rather than requires_grad toggled: DDP keeps its buckets, and without a gradient
            # neither momentum nor weight decay moves a parameter.
            for parameter in bottom_up(self._detector.student).parameters():
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"loss_normalizer": loss_normalizer(self._detector.student)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_loss_normalizer(self._detector.student, state_dict["loss_normalizer"])


def bottom_up(student: nn.Module) -> nn.Module:
    """The network below the pyramid; the whole backbone where there is no pyramid."""
    return getattr(student.backbone, "bottom_up", student.backbone)
