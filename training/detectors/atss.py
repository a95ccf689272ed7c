"""ATSS: which locations learn an object follows from the statistics of that object's own candidates.

Reference: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample
Selection", CVPR 2020, arXiv:1912.02424, with the head and losses of the LGD paper's FCOS.

Shape legend: N images, C channels, R locations of all levels together, M boxes of one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import Tensor

from training.detectors.location_head import LocationHead, Predictions
from training.detectors.location_inference import location_inference
from training.detectors.location_losses import location_losses
from training.detectors.locations import (
    LocationGrid,
    LocationTargets,
    edge_distances,
    location_grid,
    location_targets,
)


class ATSS(DenseDetector):
    """A detectron2 dense detector with one square anchor a location, which serves the assignment only.

    Args:
        backbone: a pyramid.
        head: predicts on each of ``head_in_features``.
        head_in_features: the pyramid's levels, finest first.
        num_classes: K.
        anchor_scale: side of the anchors in strides of their level.
        num_level_candidates: locations of each level, nearest to an object's centre, that are candidates; a smaller
            level gives all it has.
        focal_loss_alpha, focal_loss_gamma: of the class loss.
        box_loss_weight: of the box loss.
        test_score_thresh: of the class score, before centerness.
        test_topk_candidates: candidates of each level.
        test_nms_thresh: IoU above which the lower of two boxes of a class is dropped.
        max_detections_per_image: best of an image that are kept.
        pixel_mean, pixel_std: of each channel.
        input_format: the channels' order, ``"RGB"`` or ``"BGR"``.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: LocationHead,
        head_in_features: Sequence[str],
        num_classes: int,
        anchor_scale: float = 8.0,
        num_level_candidates: int = 9,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        box_loss_weight: float = 2.0,
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
        self.num_classes = num_classes
        self.anchor_scale = anchor_scale
        self.num_level_candidates = num_level_candidates
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.box_loss_weight = box_loss_weight
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.input_format = input_format

    def label_locations(self, features: list[Tensor], gt_instances: list[Instances]) -> LocationTargets:
        """What each location of these levels (N, C, h, w) is to learn; depends on the features' sizes only."""
        grid = location_grid(features, self.strides)
        return location_targets(grid, gt_instances, self.num_classes, self._match)

    def losses(self, predictions: Predictions, targets: LocationTargets) -> dict[str, Tensor]:
        """The named losses of the head's output."""
        return location_losses(
            predictions,
            targets,
            focal_loss_alpha=self.focal_loss_alpha,
            focal_loss_gamma=self.focal_loss_gamma,
            box_loss_weight=self.box_loss_weight,
        )

    def forward_training(
        self, images: ImageList, features: list[Tensor], predictions: Predictions, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        return self.losses(predictions, self.label_locations(features, gt_instances))

    def forward_inference(self, images: ImageList, features: list[Tensor], predictions: Predictions) -> list[Instances]:
        return location_inference(
            predictions,
            location_grid(features, self.strides),
            images.image_sizes,
            score_threshold=self.test_score_thresh,
            topk_candidates=self.test_topk_candidates,
            nms_threshold=self.test_nms_thresh,
            max_detections=self.max_detections_per_image,
        )

    def _match(self, grid: LocationGrid, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """A candidate whose IoU reaches mean + deviation of its object's candidates, and that lies in the object, takes
        that object; of several, the one with the highest IoU.

        Deviation: a pyramid with a single location in all, where the deviation is undefined, counts it as zero.
        """
        half = self.anchor_scale / 2 * grid.strides[:, None]
        iou = pairwise_iou(Boxes(boxes), Boxes(torch.cat([grid.points - half, grid.points + half], dim=1)))  # (M, R)
        candidates = self._candidates(grid, boxes)
        candidate_iou = iou.gather(1, candidates)
        threshold = candidate_iou.mean(dim=1, keepdim=True)
        if candidates.shape[1] > 1:
            threshold = threshold + candidate_iou.std(dim=1, keepdim=True)  # unbiased
        is_candidate = torch.zeros_like(iou, dtype=torch.bool).scatter_(1, candidates, True)
        inside = edge_distances(grid.points, boxes[:, None]).amin(dim=-1) > 0
        possible = is_candidate & inside & (iou >= threshold)
        highest, matched = torch.where(possible, iou, -1.0).max(dim=0)
        return matched, highest >= 0

    def _candidates(self, grid: LocationGrid, boxes: Tensor) -> Tensor:
        """Positions on the grid of the locations nearest to each box's centre, level by level: (M, candidates)."""
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        squares = (centres[:, None] - grid.points).square().sum(dim=-1)  # (M, R)
        nearest, first = [], 0
        for level in squares.split(grid.num_per_level, dim=1):
            count = min(self.num_level_candidates, level.shape[1])
            nearest.append(level.topk(count, dim=1, largest=False).indices + first)
            first += level.shape[1]
        return torch.cat(nearest, dim=1)
