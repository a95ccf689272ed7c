"""Narrow Faster and Mask R-CNNs that detect, and detectron2's own inference with them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from two_stage_detectors import faster_rcnn_tree, mask_rcnn_tree

from export.signature import Detections
from tests.export.conftest import CLASS_NAMES, canvases
from training.student import build_student


def calibrated_rcnn(*, masks: bool, seed: int = 0, class_agnostic: bool = False) -> nn.Module:
    """A tiny detector whose proposals, scores, boxes and masks vary enough to tell right from wrong."""
    tree = (mask_rcnn_tree if masks else faster_rcnn_tree)(num_proposals=200)
    tree.roi_heads.box_pooler.canonical_box_size = 56  # on small canvases too, every level has boxes
    if masks:
        tree.roi_heads.mask_pooler.canonical_box_size = 56
    tree.roi_heads.box_predictor.cls_agnostic_bbox_reg = class_agnostic
    detector = build_student(tree, num_classes=len(CLASS_NAMES), seed=seed).eval()
    if class_agnostic and masks:
        detector.roi_heads.mask_head.predictor = nn.Conv2d(16, 1, kernel_size=1)
    _calibrate(detector)
    return detector


@torch.no_grad()
def _calibrate(detector: nn.Module) -> None:
    """Give every last layer outputs of a chosen spread on real canvases."""
    images = detector.preprocess_image([{"image": torch.from_numpy(image)} for image in canvases(256, 256, 4, seed=1)])
    features = detector.backbone(images.tensor)
    rpn, heads = detector.proposal_generator, detector.roi_heads
    levels = [features[name] for name in rpn.in_features]
    logits, deltas = rpn.rpn_head(levels)
    _scale(rpn.rpn_head.objectness_logits, logits, 2.0)
    _scale(rpn.rpn_head.anchor_deltas, deltas, 0.3)
    proposals, _ = rpn(images, features)
    boxes = [p.proposal_boxes for p in proposals]
    pooled = heads.box_head(heads.box_pooler([features[name] for name in heads.box_in_features], boxes))
    scores, deltas = heads.box_predictor(pooled)
    scores = scores - scores.mean(dim=0)
    _scale(heads.box_predictor.cls_score, [scores], 1.5)
    heads.box_predictor.cls_score.bias.copy_(-heads.box_predictor.cls_score(pooled).mean(dim=0))
    heads.box_predictor.cls_score.bias[-1] += 1.5
    _scale(heads.box_predictor.bbox_pred, [deltas], 1.0)
    if heads.mask_on:
        pooled = heads.mask_pooler([features[name] for name in heads.mask_in_features], boxes)
        _scale(heads.mask_head.predictor, [heads.mask_head.layers(pooled)], 2.0)


def _scale(layer: nn.Module, outputs: list[torch.Tensor], deviation: float) -> None:
    layer.weight.mul_(deviation / torch.cat([output.flatten() for output in outputs]).std())


def detectron2_detections(detector: nn.Module, canvas: np.ndarray) -> Detections:
    """detectron2's own inference on the canvas, masks as its heads give them."""
    with torch.no_grad():
        found = detector.inference([{"image": torch.from_numpy(canvas)}], do_postprocess=False)[0]
    found = found[found.pred_boxes.nonempty()]
    return Detections(
        boxes=found.pred_boxes.tensor.numpy(),
        scores=found.scores.numpy(),
        labels=found.pred_classes.numpy().astype(np.int32),
        masks=found.pred_masks[:, 0].numpy() if found.has("pred_masks") else None,
    )
