"""GFL: a one-stage detector that predicts each edge of a box as a distribution, and class and quality as one score.

Li et al., "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense Object Detection",
NeurIPS 2020, arXiv:2006.04388; localisation distillation (Zheng et al., CVPR 2022) is made for it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from training.detectors.gfl_losses import gfl_losses
from training.detectors.location_detector import LocationBase
from training.detectors.location_head import GflPredictions
from training.detectors.locations import LocationTargets


class GflDetector(LocationBase):
    """A location that its matcher, ATSS in the paper, gives an object predicts that object's box.

    Deviation: the reference's locations are the top left corners of the cells, the anchors of mmdetection without an
    offset; here they are the centres, as of every other detector of locations. In the reference locations outside an
    image have no class loss, and an image without positive locations counts as one in the divisor; here they have, and
    it does not.

    Args:
        quality_focal_beta: of the loss of class and quality.
        box_loss_weight: of the GIoU loss.
        distribution_loss_weight: of the distribution focal loss.
        settings: of :class:`~training.detectors.location_detector.LocationBase`; the head is a
            :class:`~training.detectors.location_head.GflHead`.
    """

    def __init__(
        self,
        *,
        quality_focal_beta: float = 2.0,
        box_loss_weight: float = 2.0,
        distribution_loss_weight: float = 0.25,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.quality_focal_beta = quality_focal_beta
        self.box_loss_weight = box_loss_weight
        self.distribution_loss_weight = distribution_loss_weight

    def losses(self, predictions: GflPredictions, targets: LocationTargets) -> dict[str, Tensor]:
        return gfl_losses(
            predictions,
            targets,
            self.head.edges,
            quality_focal_beta=self.quality_focal_beta,
            box_loss_weight=self.box_loss_weight,
            distribution_loss_weight=self.distribution_loss_weight,
        )
