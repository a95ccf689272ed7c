"""From the predictions of one box a location to detections.

Shape legend: N images, K classes, D values an edge, (h, w) a level's grid, M detections.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor

from training.detectors.edges import Edges
from training.detectors.location_head import GflPredictions, Predictions
from training.detectors.locations import LocationGrid


def location_inference(
    predictions: Predictions | GflPredictions,
    grid: LocationGrid,
    edges: Edges,
    image_sizes: Sequence[tuple[int, int]],
    *,
    score_threshold: float,
    topk_candidates: int,
    nms_threshold: float,
    max_detections: int,
) -> list[Instances]:
    """Detections of every image, by falling score, in pixels of the padded image.

    Per level the ``topk_candidates`` best class scores above ``score_threshold`` remain; where centerness is predicted,
    the score becomes ``sqrt(class score * centerness)``, which may be below the threshold; then class-wise NMS over all
    levels.

    Deviation: the LGD paper's code takes at most as many candidates as a level has cells, that of GFL and LD as many
    locations with all their classes; here as many pairs as asked for, as everywhere in detectron2. On a level of few
    cells one cell may give several classes.

    Args:
        predictions: the head's.
        edges: how the predicted values give distances.
    """
    points, strides = (values.split(grid.num_per_level) for values in (grid.points, grid.strides))
    results = []
    for index, image_size in enumerate(image_sizes):
        levels = [
            _level_candidates(
                *(values[index].float() for values in predicted),
                edges=edges,
                points=points[level],
                strides=strides[level],
                score_threshold=score_threshold,
                topk_candidates=topk_candidates,
            )
            for level, predicted in enumerate(zip(*predictions, strict=True))
        ]
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*levels, strict=True))
        keep = batched_nms(boxes, scores, labels, nms_threshold)[:max_detections]
        results.append(
            Instances(image_size, pred_boxes=Boxes(boxes[keep]), scores=scores[keep], pred_classes=labels[keep])
        )
    return results


def _level_candidates(
    logits: Tensor,
    values: Tensor,
    centerness: Tensor | None = None,
    *,
    edges: Edges,
    points: Tensor,
    strides: Tensor,
    score_threshold: float,
    topk_candidates: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One level of one image: (K, h, w), (4 * D, h, w), (1, h, w) → boxes (M, 4), scores (M,), labels (M,)."""
    scores = logits.flatten(1).T.flatten().sigmoid()  # (h * w * K)
    scores, top = scores.topk(min(topk_candidates, len(scores)))
    above = scores > score_threshold
    scores, top = scores[above], top[above]
    location, labels = top // len(logits), top % len(logits)
    distances = edges.distances(values.flatten(1).T[location]) * strides[location, None]
    points = points[location]
    boxes = torch.cat([points - distances[:, :2], points + distances[:, 2:]], dim=1)
    if centerness is not None:
        scores = (scores * centerness.flatten()[location].sigmoid()).sqrt()
    return boxes, scores, labels
