"""Made-up candidates for NMS, and torchvision's greedy class-wise NMS of them."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

from export import nms

Scene = tuple[Tensor, Tensor, Tensor]


def scene(num_images: int, num_candidates: int, num_valid: int, num_objects: int, num_classes: int, seed: int) -> Scene:
    """Boxes in clusters, each around one object, unclipped; the clusters share classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(num_images, num_objects, 2, generator=generator) * 300
    sizes = torch.rand(num_images, num_objects, 2, generator=generator) * 80 + 15
    objects = torch.randint(0, num_objects, (num_images, num_candidates), generator=generator)
    jitter = torch.randn(num_images, num_candidates, 4, generator=generator)
    centre = nms.rows(centres, objects) + 8 * jitter[..., :2]
    size = nms.rows(sizes, objects) * torch.exp(0.15 * jitter[..., 2:])
    scores = torch.rand(num_images, num_candidates, generator=generator) * 0.9 + 0.05
    scores[:, torch.randperm(num_candidates, generator=generator)[num_valid:]] = 0
    labels = (objects % num_classes).int()
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1), scores, labels


def greedy(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_detections: int) -> Scene:
    """One image, torchvision's greedy NMS class by class; ties go to the lower index."""
    keep = []
    for label in labels.unique():
        of_class = torch.nonzero((labels == label) & (scores > 0))[:, 0]
        keep.append(of_class[torchvision.ops.nms(boxes[of_class], scores[of_class], iou_threshold)])
    kept = torch.cat(keep).sort().values
    kept = kept[scores[kept].argsort(descending=True, stable=True)][:max_detections]
    return boxes[kept], scores[kept], labels[kept]


def assert_equals_greedy(result: Scene, candidates: Scene, iou_threshold: float, max_detections: int) -> None:
    for image in range(len(candidates[0])):
        expected = greedy(*(x[image] for x in candidates), iou_threshold, max_detections)
        count = len(expected[1])
        for found, wanted in zip(result, expected, strict=True):
            assert torch.equal(found[image, :count], wanted)
            assert not found[image, count:].any()
