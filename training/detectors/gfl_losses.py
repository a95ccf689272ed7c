"""The losses of GFL: quality focal, distribution focal, and score-weighted GIoU.

Li et al., "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense Object Detection",
NeurIPS 2020, arXiv:2006.04388.

Shape legend: N images, R locations of all levels together, K classes, D values an edge.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.detectors.edges import EdgeDistributions
from training.detectors.location_head import GflPredictions
from training.detectors.location_losses import by_location, giou_loss, iou
from training.detectors.locations import LocationTargets, world_mean

_EPSILON = torch.finfo(torch.float32).eps
_BELOW_LAST = 0.1  # the largest target of a distribution, below its last distance, in strides


def gfl_losses(
    predictions: GflPredictions,
    targets: LocationTargets,
    edges: EdgeDistributions,
    *,
    quality_focal_beta: float,
    box_loss_weight: float,
    distribution_loss_weight: float,
) -> dict[str, Tensor]:
    """The named losses of a :class:`~training.detectors.location_head.GflHead`'s output.

    The quality focal loss is a sum over the number of positive locations, at least 1. The box loss of a positive
    location and the mean of its edges' distribution focal losses are weighted by its highest class score and divided by
    the sum of those. Both divisors are means over all processes. All is float32, also under autocast, and stays
    connected to the predictions where no location is positive.

    Args:
        edges: how the predicted values give distributions and distances.
        quality_focal_beta: the power of the distance between score and quality.
        box_loss_weight: of the whole box loss.
        distribution_loss_weight: of the whole distribution focal loss.
    """
    logits, values = (by_location(levels) for levels in predictions)
    labels, num_classes = targets.labels, logits.shape[2]
    positive = labels != num_classes
    distances = edges.distances(values)
    quality = iou(distances.detach(), targets.distances) * positive
    one_hot = labels[:, :, None] == torch.arange(num_classes, device=labels.device)
    loss_cls = quality_focal_loss(logits, one_hot * quality[:, :, None], quality_focal_beta).sum()
    scores = logits.detach().sigmoid().amax(dim=2) * positive
    sum_scores = world_mean(scores.sum()).clamp(min=_EPSILON)
    loss_box_reg = (giou_loss(distances, targets.distances) * scores).sum()
    reachable = targets.distances.clamp(min=0, max=edges.reg_max - _BELOW_LAST)
    loss_dfl = (distribution_focal_loss(edges.logits(values), reachable).mean(dim=2) * scores).sum()
    return {
        "loss_cls": loss_cls / targets.num_positives.clamp(min=1),
        "loss_box_reg": box_loss_weight * loss_box_reg / sum_scores,
        "loss_dfl": distribution_loss_weight * loss_dfl / sum_scores,
    }


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float) -> Tensor:
    """GFL, equation 5: cross entropy with a quality in [0, 1], times the power of the distance to it; elementwise."""
    distance = (quality - logits.sigmoid()).abs()
    return F.binary_cross_entropy_with_logits(logits, quality, reduction="none") * distance.pow(beta)


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """GFL, equation 6: cross entropy with the two steps beside the target, each by the target's nearness to it.

    Args:
        logits: (..., D).
        target: (...) in [0, D - 1).
    """
    log_probabilities = logits.log_softmax(dim=-1)
    before = target.long()
    nearness_of_next = target - before
    at_before, at_next = (log_probabilities.gather(-1, step[..., None])[..., 0] for step in (before, before + 1))
    return -(1 - nearness_of_next) * at_before - nearness_of_next * at_next
