"""When distillation acts, as a pure function of the iteration."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """What one iteration does.

    Attributes:
        distill: the distillation loss reaches the student; otherwise it trains the adapter alone.
        freeze_backbone: the bottom-up network is not trained, and computes no gradient.
    """

    distill: bool
    freeze_backbone: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationSchedule:
    """Half-open windows over the iterations t = 0, 1, ...

    The reference's ``POST_NONDISTILL_ITERS`` Q is ``distill_until_iter = MAX_ITER - Q + 1``.

    Attributes:
        distill_from_iter: first iteration that distils.
        distill_until_iter: first iteration that no longer does; None: until the end.
        freeze_backbone_until_iter: first iteration that trains the bottom-up network.
    """

    distill_from_iter: int = 0
    distill_until_iter: int | None = None
    freeze_backbone_until_iter: int = 0

    def phase(self, iteration: int) -> Phase:
        until = self.distill_until_iter
        return Phase(
            distill=iteration >= self.distill_from_iter and (until is None or iteration < until),
            freeze_backbone=iteration < self.freeze_backbone_until_iter,
        )
