"""The losses of a stock detectron2 detector on given features.

This is what lets the implicit teacher run through the student's own head while the student stays unmodified: a detector
family is one function here, not a class per detector.

Shape legend: N images, features ``{level: (N, C, Hl, Wl)}``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import singledispatch

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn


@singledispatch
def detection_losses(
    detector: nn.Module, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances]
) -> dict[str, Tensor]:
    """The named training losses of ``detector`` with ``features`` in place of its backbone's output.

    On the backbone's own output they equal ``detector(batched_inputs)`` in training mode.

    Raises:
        TypeError: no rule for this kind of detector.
    """
    known = ", ".join(sorted(kind.__name__ for kind in detection_losses.registry if kind is not object))
    raise TypeError(f"no losses from given features for {type(detector).__name__}; supported: {known} and subclasses")


@detection_losses.register
def _dense(
    detector: DenseDetector, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances]
) -> dict[str, Tensor]:
    levels = [features[name] for name in detector.head_in_features]
    return detector.forward_training(images, levels, detector.head(levels), gt_instances)


@detection_losses.register
def _two_stage(
    detector: GeneralizedRCNN, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances]
) -> dict[str, Tensor]:
    proposals, proposal_losses = detector.proposal_generator(images, features, gt_instances)
    _, detector_losses = detector.roi_heads(images, features, proposals, gt_instances)
    return {**detector_losses, **proposal_losses}


@singledispatch
def distilled_levels(detector: nn.Module) -> tuple[str, ...]:
    """The pyramid levels that are distilled: the head's inputs; for two-stage detectors all of the pyramid."""
    raise TypeError(f"no pyramid known for {type(detector).__name__}")


@distilled_levels.register
def _dense_levels(detector: DenseDetector) -> tuple[str, ...]:
    return tuple(detector.head_in_features)


@distilled_levels.register
def _two_stage_levels(detector: GeneralizedRCNN) -> tuple[str, ...]:
    return tuple(detector.backbone.output_shape())


@contextmanager
def same_loss_normalizer(detector: nn.Module, before: float | None) -> Iterator[None]:
    """Let a second pass over one batch use the first pass's loss normaliser, and leave no trace.

    RetinaNet and FCOS keep an exponential moving average of the number of positive anchors and update it in every
    forward. Two updates an iteration would change its momentum from 0.9 to 0.81. From the value
    ``before`` the first pass, the same update gives the same normaliser.

    Args:
        before: ``loss_normalizer(detector)`` taken before the first pass.
    """
    after = loss_normalizer(detector)
    set_loss_normalizer(detector, before)
    try:
        yield
    finally:
        set_loss_normalizer(detector, after)


def loss_normalizer(detector: nn.Module) -> float | None:
    """The detector's running number of positive anchors; None before the first iteration or where there is none."""
    return getattr(detector, "loss_normalizer", None)


def set_loss_normalizer(detector: nn.Module, value: float | None) -> None:
    if value is not None:
        detector.loss_normalizer = value
    elif hasattr(detector, "loss_normalizer"):
        del detector.loss_normalizer
