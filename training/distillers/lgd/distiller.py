"""Label-guided self-distillation (LGD): the distiller and its section of the recipe.

Reference: Zhang et al., "LGD: Label-guided Self-distillation for Object Detection", AAAI 2022, arXiv:2109.11496.

Shapes: N images, C channels, L levels of (Hl, Wl) cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from training.distillers.lgd.implicit_teacher import ImplicitTeacher
from training.distillers.lgd.instance_masks import instance_masks, mask_crops
from training.distillers.lgd.normalization import normalize_planes
from training.distillers.lgd.objects import LgdInputError, ObjectBatch, box_masks, objects_from_instances
from training.distillers.lgd.relation_adapter import Query
from training.schedule import DistillationSchedule

Features = dict[str, Tensor]

GRID_OFFSETS = (0.0, 0.5)


@dataclass(frozen=True, kw_only=True)
class LgdConfig:
    """The `distiller` section of a recipe that trains with LGD. Defaults: RetinaNet R-50, 2x schedule of the paper.

    Attributes:
        context_object: Give each image one more object, the image itself.
        use_masks: Objects are their instance masks, in what describes them and in what they cover; otherwise boxes.
        grid_offset: Where in a cell of a feature map its point is that an object covers or not: 0 (the reference's,
            half a cell off detectron2's pixel centres) or 0.5.
        soft_masks: A cell belongs to an object by the share of it that the object covers, not wholly or not at all.
            Deviation: the paper's masks are binary, and know an edge to a cell only, which on small images is a good
            part of an object.
        detach_appearance: Keep the teacher's detection loss away from the student's pyramid and backbone.
        query: What asks in the attention between appearance and labels.
        num_heads: Heads of that attention; divides the pyramid's channels.
        residual: Residual connections (He et al., CVPR 2016) around the label encoder, the attention and the mapper's
            refinements. Deviation: the paper's teacher is plain, and needs a long schedule to learn whose label is
            whose and to carry it through some twenty layers.
        teacher_trains_head: The teacher's detection losses train the student's head too, as in the paper. Without,
            the student learns as a plain one until distillation begins, and the teacher learns to speak to its head.
            In the one short training of each that was compared, a head of 64 channels did better without.
        loss_weight: Weight of the distillation loss (lambda).
        distill_from_iter: First iteration whose distillation loss reaches the student.
        distill_until_iter: First iteration at which it no longer does; None for never.
        freeze_backbone_until_iter: First iteration that trains the bottom-up backbone.
    """

    context_object: bool = True
    use_masks: bool = False
    grid_offset: float = 0.0
    soft_masks: bool = False
    detach_appearance: bool = False
    query: Query = "appearance"
    num_heads: int = 8
    residual: bool = False
    teacher_trains_head: bool = True
    loss_weight: float = 1.0
    distill_from_iter: int = 30_000
    distill_until_iter: int | None = None
    freeze_backbone_until_iter: int = 20_000

    def __post_init__(self) -> None:
        if self.query not in get_args(Query):
            raise LgdInputError(f"distiller.query is {self.query!r}; it must be one of {', '.join(get_args(Query))}.")
        if self.grid_offset not in GRID_OFFSETS:
            raise LgdInputError(f"distiller.grid_offset is {self.grid_offset}; it must be 0 or 0.5.")
        if self.soft_masks and self.grid_offset:
            raise LgdInputError(
                "distiller.soft_masks and distiller.grid_offset=0.5 exclude each other: a soft mask measures whole "
                "cells and looks at no point of them. Leave grid_offset at 0."
            )

    def schedule(self) -> DistillationSchedule:
        return DistillationSchedule(
            distill_from_iter=self.distill_from_iter,
            distill_until_iter=self.distill_until_iter,
            freeze_backbone_until_iter=self.freeze_backbone_until_iter,
        )

    def build(self, *, channels: int, num_classes: int, level_names: Sequence[str]) -> LabelGuidedDistiller:
        """The distiller for a student whose pyramid has these levels, all of `channels` channels.

        Raises:
            LgdInputError: The heads do not divide the channels, or there is no level.
        """
        if channels % self.num_heads:
            raise LgdInputError(
                f"distiller.num_heads is {self.num_heads}, which does not divide the {channels} channels of the "
                "student's pyramid. Choose a divisor of them."
            )
        if not level_names:
            raise LgdInputError("the student's pyramid has no level; LGD needs at least one.")
        return LabelGuidedDistiller(
            implicit_teacher=ImplicitTeacher(
                channels=channels,
                num_classes=num_classes,
                context_object=self.context_object,
                use_masks=self.use_masks,
                detach_appearance=self.detach_appearance,
                query=self.query,
                num_heads=self.num_heads,
                residual=self.residual,
            ),
            channels=channels,
            num_classes=num_classes,
            level_names=level_names,
            context_object=self.context_object,
            use_masks=self.use_masks,
            grid_offset=self.grid_offset,
            soft_masks=self.soft_masks,
            teacher_trains_head=self.teacher_trains_head,
            loss_weight=self.loss_weight,
        )


class LabelGuidedDistiller(nn.Module):
    """The implicit teacher, the adapter of the student's features, and the loss between the two.

    Attributes:
        implicit_teacher: Labels and features -> instructive features.
        adapter: Three convolutions that the student's features pass before they are compared; trained, not shipped.
    """

    def __init__(
        self,
        *,
        implicit_teacher: ImplicitTeacher,
        channels: int,
        num_classes: int,
        level_names: Sequence[str],
        context_object: bool,
        use_masks: bool,
        grid_offset: float,
        soft_masks: bool,
        teacher_trains_head: bool,
        loss_weight: float,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_classes = num_classes
        self.level_names = tuple(level_names)
        self.context_object = context_object
        self.use_masks = use_masks
        self.grid_offset = grid_offset
        self.soft_masks = soft_masks
        self.teacher_trains_head = teacher_trains_head
        self.loss_weight = loss_weight
        self.implicit_teacher = implicit_teacher
        self.adapter = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )

    def forward(
        self,
        *,
        features: Features,
        gt_instances: Sequence[Instances],
        padded_size: tuple[int, int],
        distill: bool,
        teacher_losses: Callable[[Features, bool], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """The losses that LGD adds to the student's own.

        Args:
            features: {level: (N, C, Hl, Wl)} of the student.
            gt_instances: Labels of each image: `gt_boxes` in pixels of the padded image, `gt_classes`, and `gt_masks`
                where masks are used. On the CPU they cost no synchronisation.
            padded_size: (Hp, Wp) of the batch that the features were computed from.
            distill: The distillation loss reaches the student; see `distillation_loss`.
            teacher_losses: The student's own head and losses, on features that are given; and whether the head learns
                from them.

        Returns:
            "loss_distill", and each loss of the teacher branch with ".tea" behind its name.
        """
        teacher_features = self.teacher_features(features, gt_instances, padded_size)
        losses = {"loss_distill": self.distillation_loss(features, teacher_features, distill=distill)}
        of_teacher = teacher_losses(teacher_features, self.teacher_trains_head)
        losses.update((f"{name}.tea", loss) for name, loss in of_teacher.items())
        return losses

    def teacher_parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer of the teacher's own trains; the adapter is trained with the student."""
        return self.implicit_teacher.parameters()

    def teacher_features(
        self, features: Features, gt_instances: Sequence[Instances], padded_size: tuple[int, int]
    ) -> Features:
        """What the implicit teacher makes of the labels and the student's features, level by level.

        Raises:
            LgdInputError: The features are not of the pyramid it was built for, a class id is out of range, or masks
                are used and missing.
        """
        self._require_own_pyramid(features)
        map_sizes = {level: (feature.shape[-2], feature.shape[-1]) for level, feature in features.items()}
        first = features[self.level_names[0]]
        objects, masks = self._objects_and_masks(gt_instances, padded_size, map_sizes, first.device)
        # In the type that the normalised features will have; one tensor a level serves pooling and painting.
        dtype = torch.promote_types(first.dtype, torch.float32)
        masks = {level: mask.to(dtype) for level, mask in masks.items()}
        teacher: Features = self.implicit_teacher(features, objects, masks)
        return teacher

    def _objects_and_masks(
        self,
        gt_instances: Sequence[Instances],
        padded_size: tuple[int, int],
        map_sizes: dict[str, tuple[int, int]],
        device: torch.device,
    ) -> tuple[ObjectBatch, dict[str, Tensor]]:
        """The labels as tensors, and the cells that each object covers: {level: (N, M, Hl * Wl)}."""
        objects = objects_from_instances(
            gt_instances, padded_size, num_classes=self.num_classes, context_object=self.context_object, device=device
        )
        if not self.use_masks:
            return objects, box_masks(objects, map_sizes, grid_offset=self.grid_offset, soft=self.soft_masks)
        crops = mask_crops(gt_instances, context_object=self.context_object, device=device)
        masks = instance_masks(
            gt_instances,
            padded_size,
            map_sizes,
            context_object=self.context_object,
            grid_offset=self.grid_offset,
            soft=self.soft_masks,
            device=device,
        )
        return dataclasses.replace(objects, mask_crops=crops), masks

    def distillation_loss(self, features: Features, teacher_features: Features, *, distill: bool) -> Tensor:
        """Weighted mean square difference of the instance-normalised features, over all elements of all levels.

        The teacher never learns from it. Without `distill` neither does the student: the loss stays, and trains the
        adapter alone, so that the adapter is ready when distillation begins.
        """
        self._require_own_pyramid(features)
        squares, num_elements = [], 0
        for level in self.level_names:
            student = features[level] if distill else features[level].detach()
            difference = normalize_planes(self.adapter(student)) - normalize_planes(teacher_features[level].detach())
            squares.append(difference.square().sum())
            num_elements += difference.numel()
        return self.loss_weight * torch.stack(squares).sum() / num_elements

    def _require_own_pyramid(self, features: Features) -> None:
        found = {level: feature.shape[1] for level, feature in features.items()}
        if set(found) != set(self.level_names) or set(found.values()) != {self.channels}:
            raise LgdInputError(
                "the features are not of the pyramid that the distiller was built for: expected levels "
                f"{', '.join(self.level_names)} of {self.channels} channels, found "
                f"{', '.join(f'{level} of {channels}' for level, channels in found.items()) or 'none'}. Build the "
                "distiller from the student's own output_shape()."
            )
