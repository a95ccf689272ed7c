"""Training without a distiller: the baseline that every method is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from detectron2.structures import Instances
from torch import Tensor, nn

from training.schedule import DistillationSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoDistillerConfig:
    """The recipe's ``distiller`` section for a plain student.

    Attributes:
        freeze_backbone_until_iter: as in the distillers, so that a baseline can share their schedule.
    """

    freeze_backbone_until_iter: int = 0

    def schedule(self) -> DistillationSchedule:
        return DistillationSchedule(freeze_backbone_until_iter=self.freeze_backbone_until_iter)

    def build(self, *, channels: int, num_classes: int, level_names: Sequence[str]) -> NoDistiller:
        return NoDistiller()


class NoDistiller(nn.Module):
    """Adds no loss and holds no parameter."""

    def teacher_parameters(self) -> Iterator[nn.Parameter]:
        yield from ()

    def forward(
        self,
        *,
        features: dict[str, Tensor],
        gt_instances: list[Instances],
        padded_size: tuple[int, int],
        distill: bool,
        teacher_losses: Callable[[dict[str, Tensor], bool], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        return {}
