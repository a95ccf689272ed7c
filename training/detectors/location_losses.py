"""The losses of detectors that predict one box a location: focal, centerness-weighted GIoU, and centerness.

Shape legend: N images, R locations of all levels together, K classes.
"""

from __future__ import annotations

import torch
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor
from torch.nn import functional as F

from training.detectors.edges import Edges
from training.detectors.location_head import Predictions
from training.detectors.locations import LocationTargets

_EPSILON = torch.finfo(torch.float32).eps


def location_losses(
    predictions: Predictions,
    targets: LocationTargets,
    edges: Edges,
    *,
    focal_loss_alpha: float,
    focal_loss_gamma: float,
    box_loss_weight: float,
) -> dict[str, Tensor]:
    """The named losses of a :class:`~training.detectors.location_head.LocationHead`'s output.

    Focal and centerness loss are sums over the number of positive locations, the box loss a sum weighted by the
    target's centerness over the sum of those weights; both divisors are means over all processes and at least 1. All is
    float32, also under autocast, and stays connected to the predictions where no location is positive.

    Args:
        edges: how the predicted values give distances.
        box_loss_weight: of the whole box loss.
    """
    logits, values, centerness = (by_location(levels) for levels in predictions)
    labels, num_classes = targets.labels, logits.shape[2]
    positive = labels != num_classes
    one_hot = labels[:, :, None] == torch.arange(num_classes, device=labels.device)
    loss_cls = sigmoid_focal_loss_jit(
        logits, one_hot.float(), alpha=focal_loss_alpha, gamma=focal_loss_gamma, reduction="sum"
    )
    loss_box_reg = (giou_loss(edges.distances(values), targets.distances) * targets.centerness).sum()
    loss_centerness = F.binary_cross_entropy_with_logits(centerness[:, :, 0], targets.centerness, reduction="none")
    num_positives = targets.num_positives.clamp(min=1)
    return {
        "loss_cls": loss_cls / num_positives,
        "loss_box_reg": box_loss_weight * loss_box_reg / targets.sum_centerness.clamp(min=1),
        "loss_centerness": (loss_centerness * positive).sum() / num_positives,
    }


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - generalised IoU of boxes given by their edges' distances from a common point: (..., 4), (..., 4) → (...).

    Rezatofighi et al., CVPR 2019. Distances are not negative, so any two such boxes intersect in that point.
    """
    intersection, union = _intersection_and_union(predicted, target)
    hull = _area(torch.maximum(predicted, target))
    return 1 - intersection / union.clamp(min=_EPSILON) + (hull - union) / hull.clamp(min=_EPSILON)


def iou(predicted: Tensor, target: Tensor) -> Tensor:
    """Of boxes as in :func:`giou_loss`: (..., 4), (..., 4) → (...); 0 for two boxes without area."""
    intersection, union = _intersection_and_union(predicted, target)
    return intersection / union.clamp(min=_EPSILON)


def _intersection_and_union(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    intersection = _area(torch.minimum(predicted, target))
    return intersection, _area(predicted) + _area(target) - intersection


def _area(distances: Tensor) -> Tensor:
    return (distances[..., 0] + distances[..., 2]) * (distances[..., 1] + distances[..., 3])


def by_location(levels: list[Tensor]) -> Tensor:
    """Per level (N, D, h, w) → (N, R, D) float32."""
    return torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2).float()
