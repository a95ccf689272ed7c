"""The losses of a stock detectron2 detector on given features.

This is what lets the implicit teacher run through the student's own head while the student stays unmodified: a detector
family is one function here, not a class per detector. Which anchors or locations learn which object does not depend on
the features, so a step that needs the losses twice assigns once (:func:`label_assignment`).

Shape legend: N images, features ``{level: (N, C, Hl, Wl)}``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import singledispatch
from typing import Any

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from training.detectors.location_detector import LocationBase
from training.detectors.locations import LocationTargets

Features = dict[str, Tensor]


class UnsupportedStudent(TypeError):
    """No losses from given features are known for this kind of detector."""

    exit_code = 2


@singledispatch
def label_assignment(detector: nn.Module, features: Features, gt_instances: list[Instances]) -> Any:
    """What each prediction of the detector is to learn, to be passed to :func:`detection_losses` any number of times.

    None where there is nothing to use twice: two-stage detectors draw new samples for every pass.

    Args:
        features: of the detector's own backbone or of the same sizes.
        gt_instances: of each image, on the features' device.
    """
    return None


@label_assignment.register(RetinaNet)
@label_assignment.register(FCOS)
def _anchor_labels(detector: RetinaNet | FCOS, features: Features, gt_instances: list[Instances]) -> Any:
    """Anchors of each level; label and box of each anchor, image by image."""
    anchors = detector.anchor_generator(_head_inputs(detector, features))
    return anchors, *detector.label_anchors(anchors, gt_instances)


@label_assignment.register
def _location_labels(detector: LocationBase, features: Features, gt_instances: list[Instances]) -> LocationTargets:
    return detector.label_locations(_head_inputs(detector, features), gt_instances)


@singledispatch
def detection_losses(
    detector: nn.Module, images: ImageList, features: Features, gt_instances: list[Instances], assigned: Any = None
) -> dict[str, Tensor]:
    """The named training losses of ``detector`` with ``features`` in place of its backbone's output.

    On the backbone's own output they equal ``detector(batched_inputs)`` in training mode.

    Args:
        assigned: ``label_assignment(detector, features, gt_instances)``; None lets the detector assign itself.

    Raises:
        UnsupportedStudent: no rule for this kind of detector.
    """
    raise UnsupportedStudent(
        f"no losses from given features for {type(detector).__name__}; supported: {_supported(detection_losses)} and "
        "subclasses. A family is one function in training/detection_losses.py."
    )


@detection_losses.register
def _dense(
    detector: DenseDetector, images: ImageList, features: Features, gt_instances: list[Instances], assigned: Any = None
) -> dict[str, Tensor]:
    levels = _head_inputs(detector, features)
    return detector.forward_training(images, levels, detector.head(levels), gt_instances)


@detection_losses.register
def _retinanet(
    detector: RetinaNet, images: ImageList, features: Features, gt_instances: list[Instances], assigned: Any = None
) -> dict[str, Tensor]:
    anchors, labels, boxes = assigned or label_assignment(detector, features, gt_instances)
    predictions = detector.head(_head_inputs(detector, features))
    logits, deltas = detector._transpose_dense_predictions(predictions, [detector.num_classes, 4])
    return detector.losses(anchors, logits, labels, deltas, boxes)


@detection_losses.register
def _fcos(
    detector: FCOS, images: ImageList, features: Features, gt_instances: list[Instances], assigned: Any = None
) -> dict[str, Tensor]:
    anchors, labels, boxes = assigned or label_assignment(detector, features, gt_instances)
    predictions = detector.head(_head_inputs(detector, features))
    logits, deltas, centerness = detector._transpose_dense_predictions(predictions, [detector.num_classes, 4, 1])
    return detector.losses(anchors, logits, labels, deltas, boxes, centerness)


@detection_losses.register
def _location(
    detector: LocationBase,
    images: ImageList,
    features: Features,
    gt_instances: list[Instances],
    assigned: LocationTargets | None = None,
) -> dict[str, Tensor]:
    targets = assigned or label_assignment(detector, features, gt_instances)
    return detector.losses(detector.head(_head_inputs(detector, features)), targets)


@detection_losses.register
def _two_stage(
    detector: GeneralizedRCNN,
    images: ImageList,
    features: Features,
    gt_instances: list[Instances],
    assigned: Any = None,
) -> dict[str, Tensor]:
    proposals, proposal_losses = detector.proposal_generator(images, features, gt_instances)
    _, detector_losses = detector.roi_heads(images, features, proposals, gt_instances)
    return {**detector_losses, **proposal_losses}


@singledispatch
def distilled_levels(detector: nn.Module) -> tuple[str, ...]:
    """The pyramid levels that are distilled: the head's inputs; for two-stage detectors all of the pyramid.

    Raises:
        UnsupportedStudent: no rule for this kind of detector.
    """
    raise UnsupportedStudent(
        f"no pyramid known for {type(detector).__name__}; supported: {_supported(distilled_levels)} and subclasses"
    )


@distilled_levels.register
def _dense_levels(detector: DenseDetector) -> tuple[str, ...]:
    return tuple(detector.head_in_features)


@distilled_levels.register
def _two_stage_levels(detector: GeneralizedRCNN) -> tuple[str, ...]:
    return tuple(detector.backbone.output_shape())


def _head_inputs(detector: DenseDetector, features: Features) -> list[Tensor]:
    return [features[name] for name in detector.head_in_features]


def _supported(function: Any) -> str:
    return ", ".join(sorted(kind.__name__ for kind in function.registry if kind is not object))


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
