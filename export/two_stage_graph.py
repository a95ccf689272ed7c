"""Faster and Mask R-CNN: pyramid → proposals → boxes of each class → NMS → masks of what is left, all on the canvas.

The order of detectron2's inference, with static shapes but for the batch: per level a fixed top-k of the proposals, NMS
within each level, the best R1 of all; then the box head on all of them, NMS within each class, and the mask head on the
R detections. Slots without a proposal or a detection are zero and count for nothing.

Deviation: predictions that are not finite are not removed; a student that makes them does not pass the strip stage.

Shape legend: N images, A anchors a location, K classes, (h, w) a level's grid, M candidates, R1 proposals, R detection
slots, C channels.
"""

from __future__ import annotations

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead, StandardROIHeads
from torch import Tensor, nn

from export.config import NmsChoice
from export.dense_graph import by_location, top_pairs, zero_below
from export.graph_parts import (
    DetectorGraph,
    InferenceSettings,
    Outputs,
    boxes_from_deltas,
    ended,
    named_levels,
    nms_of,
)
from export.nms import greedy_nms, rows
from export.roi_pooling import PyramidPooling, evenly, in_chunks, maps_of
from export.signature import DetectorSignature

MASKS_AT_ONCE = 20
"""Most images have fewer detections, and only chunks that have one are drawn."""


def two_stage_settings(detector: GeneralizedRCNN) -> InferenceSettings:
    """Read the inference settings from detectron2's RPN and box predictor."""
    predictor, heads = detector.roi_heads.box_predictor, detector.roi_heads
    return InferenceSettings(
        num_classes=heads.num_classes,
        num_candidates=max(detector.proposal_generator.pre_nms_topk[False], predictor.test_topk_per_image),
        score_threshold=predictor.test_score_thresh,
        nms_threshold=predictor.test_nms_thresh,
        max_detections=predictor.test_topk_per_image,
        mask_size=2 * heads.mask_pooler.output_size[0] if heads.mask_on else None,
    )


def why_unsupported(detector: GeneralizedRCNN) -> str | None:
    """What of the detector has no counterpart in the graph; None: it can be exported."""
    if type(detector).inference is not GeneralizedRCNN.inference:
        return "an inference of its own; there is a graph for what GeneralizedRCNN computes"
    rpn, heads = detector.proposal_generator, detector.roi_heads
    if type(rpn) is not RPN or type(heads) is not StandardROIHeads:
        return f"{type(rpn).__name__} with {type(heads).__name__}; there is a graph for RPN with StandardROIHeads"
    if heads.keypoint_on or (heads.mask_on and type(heads.mask_head) is not MaskRCNNConvUpsampleHead):
        return "a keypoint head or a mask head other than MaskRCNNConvUpsampleHead"
    if heads.box_predictor.use_sigmoid_ce or heads.train_on_pred_boxes:
        return "class scores by sigmoid, or training on predicted boxes; there is a graph for softmax scores"
    for pooler in (heads.box_pooler, heads.mask_pooler if heads.mask_on else heads.box_pooler):
        aligned = all(getattr(level, "aligned", False) and level.sampling_ratio == 0 for level in pooler.level_poolers)
        if not aligned or pooler.output_size[0] != pooler.output_size[1]:
            return "a pooler other than a square ROIAlignV2 with sampling_ratio 0"
    return None


def two_stage_graph(detector: GeneralizedRCNN, signature: DetectorSignature, nms: NmsChoice) -> TwoStageGraph:
    """The export graph of detectron2's Faster or Mask R-CNN."""
    images = torch.zeros(1, *signature.image_shape, device=detector.pixel_mean.device)
    with torch.no_grad():
        features = detector.eval().backbone(images)
    proposals = Proposals(detector.proposal_generator, features, signature, nms)
    grids = {name: (level.shape[2], level.shape[3]) for name, level in features.items()}
    return TwoStageGraph(detector, signature, proposals, grids, nms)


class Proposals(nn.Module):
    """detectron2's RPN: features of the pyramid → boxes (N, R1, 4), how many there are (N, 1), the head's outputs.

    Args:
        features: of an empty canvas, for the anchors, which are constants.
        nms: "outside" is portable here, as the second stage follows.
    """

    def __init__(self, rpn: RPN, features: dict[str, Tensor], signature: DetectorSignature, nms: NmsChoice) -> None:
        super().__init__()
        self.head = rpn.rpn_head
        self.in_features = tuple(rpn.in_features)
        self.transform = rpn.box2box_transform
        self.num_candidates, self.num_proposals = rpn.pre_nms_topk[False], rpn.post_nms_topk[False]
        self.nms = nms_of(nms, len(self.in_features)) or greedy_nms
        self.nms_threshold, self.min_box_size = rpn.nms_thresh, rpn.min_box_size
        self.signature = signature
        for level, boxes in enumerate(rpn.anchor_generator([features[name] for name in self.in_features])):
            self.register_buffer(f"anchors_{level}", boxes.tensor.float())

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, tuple[list[Tensor], list[Tensor]]]:
        outputs = self.head([features[name] for name in self.in_features])
        levels = [self._candidates(level, *predicted) for level, predicted in enumerate(zip(*outputs, strict=True))]
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        boxes = clipped(boxes, self.signature)
        size = boxes[..., 2:] - boxes[..., :2]
        scores = torch.where((size > self.min_box_size).all(dim=-1), scores, torch.zeros_like(scores))
        boxes, scores, _ = self.nms(
            boxes, scores, labels, iou_threshold=self.nms_threshold, max_detections=self.num_proposals
        )
        return boxes, (scores > 0).sum(dim=1, keepdim=True).int(), outputs

    def _candidates(self, level: int, logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, A, h, w) and (N, A * 4, h, w) → the level's boxes (N, M, 4), scores (N, M), and the level as labels."""
        top_logits, index, labels = top_pairs(logits, 1, self.num_candidates)
        anchors = getattr(self, f"anchors_{level}")[index]
        deltas = rows(by_location(deltas, 4), index)
        boxes = boxes_from_deltas(deltas, anchors, self.transform.weights, self.transform.scale_clamp)
        return boxes, positive_from_logits(top_logits.float()), torch.full_like(labels, level)


class TwoStageGraph(DetectorGraph):
    """A two-stage detector from uint8 canvas to detections; ``forward`` is what is exported.

    Its head tensors are the proposals': those of the box head depend on which proposals come first.

    Args:
        detector: shares its backbone and heads with the graph; set to eval mode.
        proposals: the first stage.
        grids: (h, w) of each level on the canvas.
        nms: see :func:`export.detector_graph.detector_graph`.
    """

    head_tensor_names = ("objectness_logits", "anchor_deltas")

    def __init__(
        self,
        detector: GeneralizedRCNN,
        signature: DetectorSignature,
        proposals: Proposals,
        grids: dict[str, tuple[int, int]],
        nms: NmsChoice,
    ) -> None:
        super().__init__()
        heads = detector.roi_heads
        self.backbone = detector.backbone
        self.proposals = proposals
        self.box_in_features = tuple(heads.box_in_features)
        self.box_pooling = PyramidPooling(heads.box_pooler, [grids[name] for name in self.box_in_features])
        self.box_head = heads.box_head
        self.box_predictor = heads.box_predictor
        self.num_classes = heads.num_classes
        self.nms = nms_of(nms, self.num_classes)
        if heads.mask_on:
            self.mask_in_features = tuple(heads.mask_in_features)
            self.mask_pooling = PyramidPooling(heads.mask_pooler, [grids[name] for name in self.mask_in_features])
            self.mask_head = heads.mask_head
        self.signature = signature
        self.register_buffer("mean", detector.pixel_mean.detach().clone().float())
        self.register_buffer("std", detector.pixel_std.detach().clone().float())
        self.eval()

    def with_head_tensors(self, images: Tensor) -> tuple[Outputs, dict[str, Tensor]]:
        features = self.backbone((images.float() - self.mean) / self.std)
        proposals, num_proposals, predicted = self.proposals(features)
        candidates = self._boxes_of_classes(features, proposals, num_proposals)
        outputs = ended(*candidates, self.nms, self.signature)
        if self.signature.mask_size is not None:
            num_detections, boxes, _, labels = outputs
            outputs += (self._masks(features, boxes, labels, num_detections),)
        return outputs, named_levels(self.head_tensor_names, predicted)

    def _boxes_of_classes(
        self, features: dict[str, Tensor], proposals: Tensor, num_proposals: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, R1 * K, 4) clipped to the canvas, scores (N, R1 * K), labels (N, R1 * K) of every proposal."""
        maps = maps_of([features[name] for name in self.box_in_features])
        num_boxes, num_classes = proposals.shape[1], self.num_classes
        num_deltas = self.box_predictor.bbox_pred.out_features

        def predicted(boxes: Tensor) -> Tensor:
            logits, deltas = self.box_predictor(self.box_head(self.box_pooling(maps, boxes)))
            return torch.cat([logits, deltas], dim=1).reshape(-1, boxes.shape[1], num_classes + 1 + num_deltas)

        logits, deltas = in_chunks(
            predicted,
            proposals,
            chunk_size=self.box_pooling.chunk_size(num_boxes, features[self.box_in_features[0]].shape[1]),
            num_values=num_classes + 1 + num_deltas,
            num_used=num_proposals,
        ).split([num_classes + 1, num_deltas], dim=2)
        exists = torch.arange(num_boxes, device=proposals.device) < num_proposals
        scores = logits.float().softmax(dim=2)[..., :-1] * exists[:, :, None]
        transform: Box2BoxTransform = self.box_predictor.box2box_transform
        boxes = boxes_from_deltas(
            deltas.reshape(-1, num_boxes, num_deltas // 4, 4),
            proposals[:, :, None],
            transform.weights,
            transform.scale_clamp,
        )
        boxes = clipped(boxes, self.signature).expand(-1, -1, num_classes, -1)  # one box for all classes is possible
        labels = torch.arange(num_classes, dtype=torch.int32, device=boxes.device).expand_as(scores)
        scores = zero_below(scores, self.signature.score_threshold)
        return boxes.flatten(1, 2), scores.flatten(1), labels.flatten(1)

    def _masks(self, features: dict[str, Tensor], boxes: Tensor, labels: Tensor, num_detections: Tensor) -> Tensor:
        """Probability that a cell of a detection's box belongs to the object: (N, R, S, S)."""
        maps = maps_of([features[name] for name in self.mask_in_features])
        num_boxes, size = boxes.shape[1], self.signature.mask_size
        assert size is not None
        with_labels = torch.cat([boxes, labels[:, :, None].float()], dim=2)

        def drawn(chunk: Tensor) -> Tensor:
            logits = self.mask_head.layers(self.mask_pooling(maps, chunk[..., :4])).flatten(2)  # (N * B, K or 1, S * S)
            if logits.shape[1] > 1:
                label = chunk[..., 4].flatten().long()[:, None, None]
                logits = logits.gather(1, label.expand(-1, -1, logits.shape[2]))
            return logits.reshape(-1, chunk.shape[1], size * size)

        logits = in_chunks(
            drawn,
            with_labels,
            chunk_size=min(
                evenly(num_boxes, MASKS_AT_ONCE),
                self.mask_pooling.chunk_size(num_boxes, features[self.mask_in_features[0]].shape[1]),
            ),
            num_values=size * size,
            num_used=num_detections,
        )
        exists = torch.arange(num_boxes, device=boxes.device) < num_detections
        return (logits.float().sigmoid() * exists[:, :, None]).reshape(-1, num_boxes, size, size)


def clipped(boxes: Tensor, signature: DetectorSignature) -> Tensor:
    """(…, 4) xyxy boxes, cut off at the canvas's border."""
    limits = boxes.new_tensor([signature.canvas_width, signature.canvas_height] * 2)
    return torch.minimum(boxes.clamp(min=0), limits)


def positive_from_logits(logits: Tensor) -> Tensor:
    """Positive numbers in the same order: NMS takes what is not above 0 for absent.

    ``1 + x`` and ``1 / (1 - x)`` keep apart what a sigmoid, which saturates, would make equal.
    """
    return torch.where(logits >= 0, 1 + logits, 1 / (1 - logits.clamp(max=0)))
