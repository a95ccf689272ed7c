"""RetinaNet that predicts each edge of a box as a distribution: the GFL-ised RetinaNet of localisation distillation.

Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022, arXiv:2102.12252.

Shape legend: N images, A anchors a location, K classes, (h, w) a level's grid.
"""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.structures import Boxes
from torch import Tensor, nn

from training.detectors.edges import EdgeDistributions


class DistributionRetinaNetHead(RetinaNetHead):
    """detectron2's head with ``4 * (reg_max + 1)`` values in place of an anchor's four deltas.

    Args:
        reg_max: an edge's distribution is over the distances 0 to this many strides; the rest is detectron2's.

    Raises:
        ValueError: ``reg_max`` is too small.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: Sequence[int],
        norm: str = "",
        prior_prob: float = 0.01,
        reg_max: int = 16,
    ) -> None:
        super().__init__(
            input_shape=list(input_shape),
            num_classes=num_classes,
            num_anchors=num_anchors,
            conv_dims=list(conv_dims),
            norm=norm,
            prior_prob=prior_prob,
        )
        self.edges = EdgeDistributions(reg_max=reg_max)
        num_values = num_anchors * 4 * self.edges.values_per_edge
        self.bbox_pred = nn.Conv2d(conv_dims[-1], num_values, kernel_size=3, padding=1)
        nn.init.normal_(self.bbox_pred.weight, std=0.01)
        nn.init.zeros_(self.bbox_pred.bias)


class DistributionRetinaNet(RetinaNet):
    """detectron2's RetinaNet with its anchors, its assignment and its focal loss; a box is the distances of its edges
    from the centre of its anchor, expectations of the predicted distributions, and its loss is GIoU.

    Deviation: losses are divided by detectron2's running number of positive anchors, in the reference by the number of
    the batch.

    Args:
        head: its raw output (N, A * K, h, w) and (N, A * 4 * (reg_max + 1), h, w) is what localisation distillation
            compares.
        box_loss_weight: of the GIoU loss.

    The rest is detectron2's.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: DistributionRetinaNetHead,
        head_in_features: Sequence[str],
        anchor_generator: DefaultAnchorGenerator,
        anchor_matcher: Matcher,
        num_classes: int,
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
        super().__init__(
            backbone=backbone,
            head=head,
            head_in_features=list(head_in_features),
            anchor_generator=anchor_generator,
            box2box_transform=Box2BoxTransformLinear(normalize_by_size=False),
            anchor_matcher=anchor_matcher,
            num_classes=num_classes,
            focal_loss_alpha=focal_loss_alpha,
            focal_loss_gamma=focal_loss_gamma,
            box_reg_loss_type="giou",
            test_score_thresh=test_score_thresh,
            test_topk_candidates=test_topk_candidates,
            test_nms_thresh=test_nms_thresh,
            max_detections_per_image=max_detections_per_image,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            input_format=input_format,
        )
        self.box_loss_weight = box_loss_weight

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        losses = super().losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        return {**losses, "loss_box_reg": self.box_loss_weight * losses["loss_box_reg"]}

    def _transpose_dense_predictions(
        self, predictions: list[list[Tensor]], dims_per_anchor: list[int]
    ) -> list[list[Tensor]]:
        """What detectron2's training and inference make of the head's output, here with distances in pixels where they
        expect an anchor's four values: per level (N, h * w * A, K) and (N, h * w * A, 4).
        """
        edges = self.head.edges
        logits, values = super()._transpose_dense_predictions(
            predictions, [dims_per_anchor[0], 4 * edges.values_per_edge]
        )
        strides = self.anchor_generator.strides
        return [logits, [edges.distances(x) * stride for x, stride in zip(values, strides, strict=True)]]
