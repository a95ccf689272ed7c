"""One-stage detectors that predict one box a location: FCOS as the LGD paper trains it, and ATSS.

The two differ in their matcher: FCOS is :class:`~training.detectors.fcos_matcher.FcosMatcher`, ATSS
:class:`~training.detectors.atss_matcher.AtssMatcher` with the head and losses of that FCOS. detectron2's own FCOS
differs: no scale a level, a box loss without centerness weights, a running loss normaliser, another threshold. With a
head of distributions they are the GFL-ised FCOS and ATSS of Zheng et al., "Localization Distillation for Dense Object
Detection", CVPR 2022: the losses stay, and the boxes are the distributions' expectations.

Shape legend: N images, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from torch import Tensor

from training.detectors.location_head import GflHead, LocationHead, Predictions
from training.detectors.location_inference import location_inference
from training.detectors.location_losses import location_losses
from training.detectors.locations import LocationTargets, Match, location_grid, location_targets


class LocationBase(DenseDetector, ABC):
    """A detectron2 dense detector: a location that its matcher gives an object predicts that object's box.

    Args:
        backbone: a pyramid.
        head: predicts on each of ``head_in_features``; its ``edges`` say how the values it predicts give a box.
        head_in_features: the pyramid's levels, finest first.
        matcher: says which locations learn which object.
        num_classes: K.
        test_score_thresh: of the class score, before centerness where there is any.
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
        head: LocationHead | GflHead,
        head_in_features: Sequence[str],
        matcher: Match,
        num_classes: int,
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

    @abstractmethod
    def losses(self, predictions: Any, targets: LocationTargets) -> dict[str, Tensor]:
        """The named losses of the head's output."""

    def forward_training(
        self, images: ImageList, features: list[Tensor], predictions: Any, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        return self.losses(predictions, self.label_locations(features, gt_instances))

    def forward_inference(self, images: ImageList, features: list[Tensor], predictions: Any) -> list[Instances]:
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


class LocationDetector(LocationBase):
    """FCOS as the LGD paper trains it, ATSS, and their GFL-ised forms.

    Args:
        focal_loss_alpha, focal_loss_gamma: of the class loss.
        box_loss_weight: of the box loss.
        settings: of :class:`LocationBase`.
    """

    def __init__(
        self,
        *,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        box_loss_weight: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.box_loss_weight = box_loss_weight

    def losses(self, predictions: Predictions, targets: LocationTargets) -> dict[str, Tensor]:
        return location_losses(
            predictions,
            targets,
            self.head.edges,
            focal_loss_alpha=self.focal_loss_alpha,
            focal_loss_gamma=self.focal_loss_gamma,
            box_loss_weight=self.box_loss_weight,
        )
