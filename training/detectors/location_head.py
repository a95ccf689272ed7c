"""The heads of detectors that predict one box a location.

Shape legend: N images, C channels, K classes, D values an edge, (h, w) a level's grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from training.detectors.edges import EdgeDistributions, edges_of

Predictions = tuple[list[Tensor], list[Tensor], list[Tensor]]
GflPredictions = tuple[list[Tensor], list[Tensor]]


class Scale(nn.Module):
    """One learnable factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.scale


class LocationHead(nn.Module):
    """The head of :class:`~training.detectors.location_detector.LocationDetector`: two towers shared by all levels, one
    for classes, one for boxes and centerness.

    Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019, with centerness on the box tower and
    a learnable scale a level, as the LGD paper's FCOS and ATSS have it. Submodules are named as in that code, so that
    its checkpoints fit by name.

    Args:
        channels: C, of the pyramid and of the towers.
        num_classes: K.
        num_levels: pyramid levels, for the scales.
        num_convs: 3x3 convolutions in each tower.
        norm_groups: groups of the normalisation behind each; divides the channels into groups of two or more.
        prior_prob: the class score that the untrained head gives.
        reg_max: an edge is predicted as a distribution of its distance from 0 to this many strides, which localisation
            distillation needs (Zheng et al., CVPR 2022); None: as the distance.

    Raises:
        ValueError: the groups do not divide the channels, or each is a single channel; ``reg_max`` is too small.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        num_levels: int = 5,
        num_convs: int = 4,
        norm_groups: int = 32,
        prior_prob: float = 0.01,
        reg_max: int | None = None,
    ) -> None:
        super().__init__()
        self.edges = edges_of(reg_max)
        self.cls_subnet = _tower(channels, num_convs, norm_groups)
        self.bbox_subnet = _tower(channels, num_convs, norm_groups)
        self.cls_score = _predictor(channels, num_classes)
        self.bbox_pred = _predictor(channels, 4 * self.edges.values_per_edge)
        self.centerness = _predictor(channels, 1)
        self.scales = nn.ModuleList(Scale() for _ in range(num_levels))
        _initialize(self, self.cls_score, prior_prob)

    def forward(self, features: list[Tensor]) -> Predictions:
        """Predict on every level.

        Args:
            features: per level (N, C, h, w), as many as there are scales.

        Returns:
            Per level: class logits (N, K, h, w); float32 values (N, 4 * D, h, w) of the edges, which ``edges`` turns
            into distances from the location; centerness logits (N, 1, h, w).
        """
        logits, values, centerness = [], [], []
        for feature, scale in zip(features, self.scales, strict=True):
            logits.append(self.cls_score(self.cls_subnet(feature)))
            box_feature = self.bbox_subnet(feature)
            values.append(scale(self.bbox_pred(box_feature).float()))
            centerness.append(self.centerness(box_feature))
        return logits, values, centerness


class GflHead(nn.Module):
    """The head of :class:`~training.detectors.gfl_detector.GflDetector`: two towers shared by all levels, one for class
    and quality as one score, one for the distributions of the edges.

    Li et al., "Generalized Focal Loss", NeurIPS 2020, arXiv:2006.04388. Submodules are named as those of
    :class:`LocationHead`; arguments and errors as there.

    Args:
        reg_max: an edge's distribution is over the distances 0 to this many strides.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        num_levels: int = 5,
        num_convs: int = 4,
        norm_groups: int = 32,
        prior_prob: float = 0.01,
        reg_max: int = 16,
    ) -> None:
        super().__init__()
        self.edges = EdgeDistributions(reg_max=reg_max)
        self.cls_subnet = _tower(channels, num_convs, norm_groups)
        self.bbox_subnet = _tower(channels, num_convs, norm_groups)
        self.cls_score = _predictor(channels, num_classes)
        self.bbox_pred = _predictor(channels, 4 * self.edges.values_per_edge)
        self.scales = nn.ModuleList(Scale() for _ in range(num_levels))
        _initialize(self, self.cls_score, prior_prob)

    def forward(self, features: list[Tensor]) -> GflPredictions:
        """Predict on every level.

        Args:
            features: per level (N, C, h, w), as many as there are scales.

        Returns:
            Per level: logits (N, K, h, w) of class and quality; float32 logits (N, 4 * (reg_max + 1), h, w) of the
            distributions, edge by edge.
        """
        logits, values = [], []
        for feature, scale in zip(features, self.scales, strict=True):
            logits.append(self.cls_score(self.cls_subnet(feature)))
            values.append(scale(self.bbox_pred(self.bbox_subnet(feature)).float()))
        return logits, values


def _predictor(channels: int, num_values: int) -> nn.Conv2d:
    return nn.Conv2d(channels, num_values, kernel_size=3, padding=1)


def _initialize(head: nn.Module, classifier: nn.Conv2d, prior_prob: float) -> None:
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    nn.init.constant_(classifier.bias, -math.log((1 - prior_prob) / prior_prob))


def _tower(channels: int, num_convs: int, norm_groups: int) -> nn.Sequential:
    if norm_groups < 1 or channels % norm_groups:
        raise ValueError(
            f"the head's norm_groups is {norm_groups}, which does not divide its {channels} channels; choose a divisor"
        )
    if channels == norm_groups:
        raise ValueError(
            f"the head's norm_groups is {norm_groups} for {channels} channels, one channel a group; expected two or "
            "more, since on a level of 1 x 1 a group would be a single value, which cannot be normalised: choose a "
            "smaller divisor of the channels, or more channels"
        )
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers += [
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.GroupNorm(norm_groups, channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)
