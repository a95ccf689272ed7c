"""FCOS as the LGD paper trains it.

Reference: Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019, in the form of the LGD
paper's published numbers. detectron2's own FCOS differs: no scale a level, a box loss without centerness weights, a
running loss normaliser, another threshold.

Shape legend: N images, C channels, R locations of all levels together, M boxes of one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
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


class PaperFCOS(DenseDetector):
    """A detectron2 dense detector: a location inside an object's centre region predicts that object's box.

    Args:
        backbone: a pyramid.
        head: predicts on each of ``head_in_features``.
        head_in_features: the pyramid's levels, finest first.
        num_classes: K.
        center_sampling_radius: half the side of the square around a box's centre, clipped to the box, whose locations
            are positive; in strides of the level.
        level_size_bounds: which level a location's object belongs to, by the largest distance to its edges in pixels:
            level i takes from bound i - 1 to bound i, both included; one bound less than levels.
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
        center_sampling_radius: float = 1.5,
        level_size_bounds: Sequence[float] = (64, 128, 256, 512),
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        box_loss_weight: float = 1.0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
    ) -> None:
        super().__init__(backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std)
        if len(level_size_bounds) != len(head_in_features) - 1:
            raise ValueError(
                f"level_size_bounds has {len(level_size_bounds)} values for {len(head_in_features)} levels; give one "
                "less than levels"
            )
        self.strides = [backbone.output_shape()[name].stride for name in head_in_features]
        self.num_classes = num_classes
        self.center_sampling_radius = center_sampling_radius
        self.level_size_bounds = tuple(level_size_bounds)
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
        """A location takes the smallest box that it lies near the centre of and that is of its level's size."""
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        radius = self.center_sampling_radius * grid.strides[:, None]  # (R, 1)
        region = torch.cat(
            [
                torch.maximum(centres[:, None] - radius, boxes[:, None, :2]),
                torch.minimum(centres[:, None] + radius, boxes[:, None, 2:]),
            ],
            dim=-1,
        )  # (M, R, 4)
        near_centre = edge_distances(grid.points, region).amin(dim=-1) > 0
        size = edge_distances(grid.points, boxes[:, None]).amax(dim=-1)
        smallest, largest = self._level_sizes(grid)
        possible = near_centre & (size >= smallest) & (size <= largest)
        extent = boxes[:, 2:] - boxes[:, :2]
        area = torch.where(possible, (extent[:, 0] * extent[:, 1])[:, None], torch.inf)
        smallest_area, matched = area.min(dim=0)
        return matched, smallest_area < torch.inf

    def _level_sizes(self, grid: LocationGrid) -> tuple[Tensor, Tensor]:
        """Smallest and largest size (R,) that each location is responsible for."""
        bounds = (-1.0, *self.level_size_bounds, float("inf"))
        levels = list(enumerate(grid.num_per_level))
        smallest = torch.cat([grid.strides.new_full((count,), bounds[i]) for i, count in levels])
        largest = torch.cat([grid.strides.new_full((count,), bounds[i + 1]) for i, count in levels])
        return smallest, largest
