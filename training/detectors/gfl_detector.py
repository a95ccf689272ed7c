"""GFL: a one-stage detector that predicts each edge of a box as a distribution, and class and quality as one score.

Li et al., "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense Object Detection",
NeurIPS 2020, arXiv:2006.04388; localisation distillation (Zheng et al., CVPR 2022) is made for it.

Shape legend: N images, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from torch import Tensor

from training.detectors.gfl_losses import gfl_losses
from training.detectors.location_head import GflHead, GflPredictions
from training.detectors.location_inference import location_inference
from training.detectors.locations import LocationTargets, Match, location_grid, location_targets


class GflDetector(DenseDetector):
    """A detectron2 dense detector: a location that its matcher gives an object predicts that object's box.

    Deviation: the reference's locations are the top left corners of the cells, the anchors of mmdetection without an
    offset; here they are the centres, as of every other detector of locations. In the reference locations outside an
    image have no class loss, and an image without positive locations counts as one in the divisor; here they have, and
    it does not.

    Args:
        backbone: a pyramid.
        head: predicts on each of ``head_in_features``; its raw output is what localisation distillation compares.
        head_in_features: the pyramid's levels, finest first.
        matcher: says which locations learn which object; ATSS in the paper.
        num_classes: K.
        quality_focal_beta: of the loss of class and quality.
        box_loss_weight: of the GIoU loss.
        distribution_loss_weight: of the distribution focal loss.
        test_score_thresh: of the score.
        test_topk_candidates: candidates of each level.
        test_nms_thresh: IoU above which the lower of two boxes of a class is dropped.
        max_detections_per_image: best of an image that are kept.
        pixel_mean, pixel_std: of each channel.
        input_format: the channels' order, ``"RGB"`` or ``"BGR"``.

    Raises:
        ValueError: the matcher does not fit these levels.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: GflHead,
        head_in_features: Sequence[str],
        matcher: Match,
        num_classes: int,
        quality_focal_beta: float = 2.0,
        box_loss_weight: float = 2.0,
        distribution_loss_weight: float = 0.25,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
    ) -> None:
        super().__init__(backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.strides = [backbone.output_shape()[name].stride for name in head_in_features]
        self.matcher = matcher
        self.num_classes = num_classes
        self.quality_focal_beta = quality_focal_beta
        self.box_loss_weight = box_loss_weight
        self.distribution_loss_weight = distribution_loss_weight
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.input_format = input_format
        # Once on levels of one location: a matcher of other levels is refused here, not in the first step.
        matcher(location_grid([torch.zeros(1, 1, 1, 1)] * len(self.strides), self.strides), torch.zeros(1, 4))

    def label_locations(self, features: list[Tensor], gt_instances: list[Instances]) -> LocationTargets:
        """What each location of these levels (N, C, h, w) is to learn; depends on the features' sizes only."""
        return location_targets(location_grid(features, self.strides), gt_instances, self.num_classes, self.matcher)

    def losses(self, predictions: GflPredictions, targets: LocationTargets) -> dict[str, Tensor]:
        """The named losses of the head's output."""
        return gfl_losses(
            predictions,
            targets,
            self.head.edges,
            quality_focal_beta=self.quality_focal_beta,
            box_loss_weight=self.box_loss_weight,
            distribution_loss_weight=self.distribution_loss_weight,
        )

    def forward_training(
        self, images: ImageList, features: list[Tensor], predictions: GflPredictions, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        return self.losses(predictions, self.label_locations(features, gt_instances))

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: GflPredictions
    ) -> list[Instances]:
        return location_inference(
            predictions,
            location_grid(features, self.strides),
            self.head.edges,
            images.image_sizes,
            score_threshold=self.test_score_thresh,
            topk_candidates=self.test_topk_candidates,
            nms_threshold=self.test_nms_thresh,
            max_detections=self.max_detections_per_image,
        )
