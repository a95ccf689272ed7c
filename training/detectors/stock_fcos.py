"""detectron2's own FCOS, told its channel order."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead


def stock_fcos(
    *,
    backbone: Backbone,
    head: FCOSHead,
    head_in_features: Sequence[str],
    num_classes: int,
    center_sampling_radius: float = 1.5,
    focal_loss_alpha: float = 0.25,
    focal_loss_gamma: float = 2.0,
    test_score_thresh: float = 0.2,
    test_topk_candidates: int = 1000,
    test_nms_thresh: float = 0.6,
    max_detections_per_image: int = 100,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    input_format: str = "BGR",
) -> FCOS:
    """Build ``detectron2.modeling.meta_arch.fcos.FCOS``; the arguments are its own.

    Args:
        input_format: ``"RGB"`` or ``"BGR"``. Every other detector of detectron2 keeps it as an attribute and whoever
            reads images for it looks there; FCOS has no such argument, so the attribute is set here. It is no part of
            the state dict.
    """
    detector = FCOS(
        backbone=backbone,
        head=head,
        head_in_features=list(head_in_features),
        num_classes=num_classes,
        center_sampling_radius=center_sampling_radius,
        focal_loss_alpha=focal_loss_alpha,
        focal_loss_gamma=focal_loss_gamma,
        test_score_thresh=test_score_thresh,
        test_topk_candidates=test_topk_candidates,
        test_nms_thresh=test_nms_thresh,
        max_detections_per_image=max_detections_per_image,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )
    detector.input_format = input_format
    return detector
