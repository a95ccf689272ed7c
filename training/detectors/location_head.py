"""The head of :class:`~training.detectors.location_detector.LocationDetector`.

Shape legend: N images, C channels, K classes, (h, w) a level's grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

Predictions = tuple[list[Tensor], list[Tensor], list[Tensor]]


class Scale(nn.Module):
    """One learnable factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.scale


class LocationHead(nn.Module):
    """Two towers shared by all levels: one for classes, one for boxes and centerness.

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

    Raises:
        ValueError: the groups do not divide the channels, or each is a single channel.
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
    ) -> None:
        super().__init__()
        if norm_groups < 1 or channels % norm_groups:
            raise ValueError(
                f"the head's norm_groups is {norm_groups}, which does not divide its {channels} channels; "
                "choose a divisor"
            )
        if channels == norm_groups:
            raise ValueError(
                f"the head's norm_groups is {norm_groups} for {channels} channels, one channel a group; expected two "
                "or more, since on a level of 1 x 1 a group would be a single value, which cannot be normalised: "
                "choose a smaller divisor of the channels, or more channels"
            )
        self.cls_subnet = _tower(channels, num_convs, norm_groups)
        self.bbox_subnet = _tower(channels, num_convs, norm_groups)
        self.cls_score = nn.Conv2d(channels, num_classes, kernel_size=3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, 4, kernel_size=3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, kernel_size=3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in range(num_levels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    def forward(self, features: list[Tensor]) -> Predictions:
        """Predict on every level.

        Args:
            features: per level (N, C, h, w), as many as there are scales.

        Returns:
            Per level: class logits (N, K, h, w); float32 distances (N, 4, h, w) of left, top, right and bottom edge
            from the location, not negative, in strides of the level; centerness logits (N, 1, h, w).
        """
        logits, distances, centerness = [], [], []
        for feature, scale in zip(features, self.scales, strict=True):
            logits.append(self.cls_score(self.cls_subnet(feature)))
            box_feature = self.bbox_subnet(feature)
            distances.append(scale(self.bbox_pred(box_feature).float()).relu())
            centerness.append(self.centerness(box_feature))
        return logits, distances, centerness


def _tower(channels: int, num_convs: int, norm_groups: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers += [
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.GroupNorm(norm_groups, channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)
