"""The distiller against the same mathematics written a second time, one image, level, object and cell at a time.

The second writing shares nothing with the modules but the names of their parameters. It knows no padding, no batched
attention and no library normalisation; only the convolution is PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import PolygonMasks
from torch import Tensor
from torch.nn import functional as F

from training.distillers.lgd.distiller import LgdConfig

EPSILON = 1e-5


@dataclass
class LoopObject:
    """A clamped box, and of what it was made from the class and the rectangle that is its mask."""

    box: list[float]
    class_id: int | None
    labelled_box: list[float]
    mask: tuple[int, int, int, int] | None
    covers_all: bool = False


@dataclass
class LoopTeacher:
    """LGD in loops, over the parameters of a `LabelGuidedDistiller`."""

    parameters: dict[str, Tensor]
    num_classes: int
    config: LgdConfig
    padded_size: tuple[int, int]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.parameters[f"{name}.weight"] @ x + self.parameters[f"{name}.bias"]

    def convolution(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        return F.conv2d(x[None], weight, bias, padding=1)[0]

    def layer(self, name: str, x: Tensor) -> Tensor:
        return standardized(self.linear(f"implicit_teacher.{name}", x)).clamp(min=0)

    def transform(self, name: str, x: Tensor) -> Tensor:
        hidden = x
        for index in range(5):
            hidden = self.layer(f"{name}.matrix.{index}", hidden)
        matrix = self.linear(f"implicit_teacher.{name}.matrix.5", hidden).reshape(len(x), len(x))
        result = torch.zeros_like(x)
        for row in range(len(x)):
            result = result + x[row] * matrix[row]
        return result

    def objects(self, boxes: list[list[float]], classes: list[int], masks: list[Any]) -> list[LoopObject]:
        """The objects of an image, with what is added to them."""
        height, width = self.padded_size
        rows: list[tuple[Any, ...]] = list(zip(boxes, classes, boxes, masks, strict=True))
        if not rows:
            rows = [([0.0, 0.0, 1.0, 1.0], None, [0.0, 0.0, 1.0, 1.0], None, self.config.context_object)]
        elif self.config.context_object:
            whole = [0.0, 0.0, float(width), float(height)]
            rows.append((whole, None, whole, (0, 0, width, height), True))
        limits = (width - 1, height - 1, width - 1, height - 1)
        return [
            LoopObject([min(max(v, 0.0), limit) for v, limit in zip(box, limits, strict=True)], *others)
            for box, *others in rows
        ]

    def crop(self, row: LoopObject) -> list[float]:
        """The mask at the middles of 7 x 7 cells of the labelled box."""
        x1, y1, x2, y2 = row.labelled_box
        return [
            float(within(row.mask, x1 + (column + 0.5) * (x2 - x1) / 7, y1 + (line + 0.5) * (y2 - y1) / 7))
            for line in range(7)
            for column in range(7)
        ]

    def label_embeddings(self, rows: list[LoopObject]) -> list[Tensor]:
        height, width = self.padded_size
        local, wide, descriptors = [], [], []
        for row in rows:
            x1, y1, x2, y2 = row.box
            code = [1.0 if k == row.class_id else 0.0 for k in range(self.num_classes)]
            values = [x1 / width, y1 / height, x2 / width, y2 / height, *code]
            values += self.crop(row) if self.config.use_masks else []
            x = torch.tensor([2 * value - 1 for value in values], dtype=torch.float64)
            descriptors.append(x)
            x = self.layer("label_encoder.local.1", self.transform("label_encoder.local.0", x))
            local.append(self.transform("label_encoder.local.2", x))
            wide.append(self.layer("label_encoder.wide.1", self.layer("label_encoder.wide.0", local[-1])))
        image_wide = wide[0]
        for other in wide[1:]:
            image_wide = torch.maximum(image_wide, other)
        embeddings = [self.layer("label_encoder.embedding", torch.cat((x, image_wide))) for x in local]
        if not self.config.residual:
            return embeddings
        direct = [self.linear("implicit_teacher.label_encoder.shortcut", x) for x in descriptors]
        return [embedding + added for embedding, added in zip(embeddings, direct, strict=True)]

    def shares(self, row: LoopObject, map_height: int, map_width: int) -> dict[tuple[int, int], float]:
        """How much of each cell the object covers, of those that it covers."""
        if self.config.use_masks:
            return dict.fromkeys(self.cells_of_mask(row, map_height, map_width), 1.0)
        if not self.config.soft_masks:
            return dict.fromkeys(self.cells_of_box(row, map_height, map_width), 1.0)
        height, width = self.padded_size
        shares = {}
        for line in range(map_height):
            for column in range(map_width):
                left, right = column * width / map_width, (column + 1) * width / map_width
                top, bottom = line * height / map_height, (line + 1) * height / map_height
                across, down = (
                    min(right, row.box[2]) - max(left, row.box[0]),
                    min(bottom, row.box[3]) - max(top, row.box[1]),
                )
                if across > 0 and down > 0:
                    shares[line, column] = across * down / ((right - left) * (bottom - top))
        return shares

    def cells_of_box(self, row: LoopObject, map_height: int, map_width: int) -> list[tuple[int, int]]:
        box, offset = row.box, self.config.grid_offset
        height, width = self.padded_size
        x1, x2 = (box[i] * map_width / width for i in (0, 2))
        y1, y2 = (box[i] * map_height / height for i in (1, 3))
        return [
            (row, column)
            for row in range(map_height)
            for column in range(map_width)
            if x2 > x1 and y2 > y1
            if abs(column + offset - (x1 + x2) / 2) <= (x2 - x1) / 2
            if abs(row + offset - (y1 + y2) / 2) <= (y2 - y1) / 2
        ]

    def cells_of_mask(self, row: LoopObject, map_height: int, map_width: int) -> list[tuple[int, int]]:
        """Those whose pixel lies on the mask; a pixel is where its middle is."""
        height, width = self.padded_size
        cells = []
        for line in range(map_height):
            for column in range(map_width):
                y = math.floor((line + self.config.grid_offset) * height / map_height)
                x = math.floor((column + self.config.grid_offset) * width / map_width)
                if row.covers_all or within(row.mask, x + 0.5, y + 0.5):
                    cells.append((line, column))
        return cells

    def appearance(self, features: Tensor, shares: dict[tuple[int, int], float]) -> Tensor:
        total = torch.zeros(len(features), dtype=torch.float64)
        for (row, column), share in shares.items():
            total = total + share * features[:, row, column]
        return total / max(1, sum(shares.values()))

    def attend(self, query: Tensor, others: list[Tensor]) -> Tensor:
        channels, name = len(query), "implicit_teacher.relation_adapter.attention"
        width = channels // self.config.num_heads
        weight, bias = self.parameters[f"{name}.in_proj_weight"], self.parameters[f"{name}.in_proj_bias"]

        def project(part: int, x: Tensor) -> Tensor:
            rows = slice(part * channels, (part + 1) * channels)
            return weight[rows] @ x + bias[rows]

        asked, keys, values = project(0, query), [project(1, x) for x in others], [project(2, x) for x in others]
        heads = []
        for head in range(self.config.num_heads):
            part = slice(head * width, (head + 1) * width)
            scores = [(asked[part] @ key[part]) / math.sqrt(width) for key in keys]
            exponentials = [torch.exp(score - max(scores)) for score in scores]
            heads.append(
                sum(e * value[part] for e, value in zip(exponentials, values, strict=True)) / sum(exponentials)
            )
        return self.linear(f"{name}.out_proj", torch.cat(heads))

    def teacher_features(self, features: Tensor, rows: list[LoopObject]) -> Tensor:
        """(C, H, W) of one image at one level -> the same of the teacher."""
        _, map_height, map_width = features.shape
        source = features.detach() if self.config.detach_appearance else features
        projected = standardized(self.convolution("implicit_teacher.appearance_encoder.projection", source)).clamp(
            min=0
        )
        covered = [self.shares(row, map_height, map_width) for row in rows]
        appearance = [self.appearance(projected, shares) for shares in covered]
        labels = [self.layer("relation_adapter.label_projection", u) for u in self.label_embeddings(rows)]
        asking, answering = (appearance, labels) if self.config.query == "appearance" else (labels, appearance)
        interacted = [self.attend(query, answering) for query in asking]
        if self.config.residual:
            interacted = [read + label for read, label in zip(interacted, labels, strict=True)]

        mapper = "implicit_teacher.knowledge_mapper"
        painted = torch.zeros_like(features)
        painted_rows = len(rows) - 1 if self.config.context_object else len(rows)
        for index in range(painted_rows):
            vector = self.linear(f"{mapper}.object_projection", interacted[index])
            where = torch.zeros(map_height, map_width, dtype=torch.float64)
            for cell, share in covered[index].items():
                where[cell] = share
            painted = painted + vector[:, None, None] * where
        result = self.convolution(f"{mapper}.spread", painted)
        if self.config.context_object:
            result = result + self.linear(f"{mapper}.context_projection", interacted[-1])[:, None, None]
        for index in range(3):
            refined = self.convolution(f"{mapper}.refinement.{index}", result.clamp(min=0))
            if self.config.residual:
                result = result + torch.stack([standardized(plane) for plane in refined])
            else:
                result = standardized(refined)
        return torch.stack([standardized(plane) for plane in result]) if self.config.residual else result

    def adapted(self, features: Tensor) -> Tensor:
        for index in (0, 2):
            features = self.convolution(f"adapter.{index}", features).clamp(min=0)
        return self.convolution("adapter.4", features)


def within(rectangle: tuple[int, int, int, int] | None, x: float, y: float) -> bool:
    return rectangle is not None and rectangle[0] <= x < rectangle[2] and rectangle[1] <= y < rectangle[3]


def standardized(x: Tensor) -> Tensor:
    mean = x.sum() / x.numel()
    variance = ((x - mean) ** 2).sum() / x.numel()
    return (x - mean) / torch.sqrt(variance + EPSILON)


def distillation_loss_in_loops(teacher: LoopTeacher, student: list[Tensor], instructive: list[Tensor]) -> Tensor:
    total, count = torch.zeros((), dtype=torch.float64), 0
    for features, target in zip(student, instructive, strict=True):
        for ours, theirs in zip(teacher.adapted(features), target.detach(), strict=True):
            total = total + ((standardized(ours) - standardized(theirs)) ** 2).sum()
            count += ours.numel()
    return teacher.config.loss_weight * total / count


BOXES: list[list[list[float]]] = [
    [[3.3, 5.1, 60.2, 44.7], [30.0, 10.0, 95.0, 63.0], [70.4, 40.1, 72.0, 41.3]],
    [],
    [[-4.0, 20.5, 130.0, 90.0]],
]

# A rectangle each, at multiples of a seventh of its box or beyond it: 7 x 7 cells then need no fraction of a cell.
MASKED_BOXES: list[list[list[float]]] = [
    [[4.0, 6.0, 60.0, 48.0], [30.0, 10.0, 93.0, 59.0], [70.0, 40.0, 77.0, 47.0]],
    [],
    [[-14.0, 20.0, 126.0, 90.0]],
]
MASKS = [[(12, 6, 44, 36), (48, 17, 93, 45), (71, 42, 75, 47)], [], [(-14, 30, 66, 70)]]

PYRAMID = {"p2": (16, 24), "p3": (8, 12), "p4": (4, 6)}
CASES = {
    "context": (LgdConfig(loss_weight=0.7), 32, 5, PYRAMID),
    "no context": (LgdConfig(context_object=False), 32, 5, PYRAMID),
    "middles of cells": (LgdConfig(grid_offset=0.5, num_heads=4), 16, 3, {"p3": (8, 12), "p4": (4, 6)}),
    "soft masks": (LgdConfig(soft_masks=True, num_heads=4), 16, 3, {"p3": (8, 12), "p5": (2, 3)}),
    "residual": (LgdConfig(residual=True, num_heads=2), 8, 3, {"p3": (8, 12), "p5": (2, 3)}),
    "masks": (LgdConfig(use_masks=True, context_object=False, num_heads=2), 8, 3, {"p3": (8, 12), "p5": (2, 3)}),
    "masks and context": (LgdConfig(use_masks=True, grid_offset=0.5, num_heads=2), 8, 3, {"p3": (8, 12)}),
    "detached": (LgdConfig(detach_appearance=True, num_heads=2), 8, 1, {"p4": (4, 6)}),
    "labels ask": (LgdConfig(query="label", num_heads=4), 16, 3, {"p5": (2, 3), "p6": (1, 2), "p7": (1, 1)}),
}


@pytest.mark.parametrize("case", CASES)
def test_teacher_loss_and_all_gradients_equal_a_computation_in_loops(case: str, labels: Callable[..., Any]) -> None:
    config, channels, num_classes, map_sizes = CASES[case]
    torch.manual_seed(0)
    distiller = config.build(channels=channels, num_classes=num_classes, level_names=list(map_sizes)).double()
    with torch.no_grad():
        for name, parameter in distiller.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # attention's biases start at zero, which would hide them
    padded_size = (64, 96)
    boxes = MASKED_BOXES if config.use_masks else BOXES
    classes = [[index % num_classes for index in range(len(of_image))] for of_image in boxes]
    gt_instances = [labels(b, c, padded_size) for b, c in zip(boxes, classes, strict=True)]
    masks: list[list[Any]] = [[None] * len(of_image) for of_image in boxes]
    if config.use_masks:
        masks = MASKS
        for instances, of_image in zip(gt_instances, masks, strict=True):
            instances.gt_masks = PolygonMasks(
                [[np.array([x1, y1, x2, y1, x2, y2, x1, y2])] for x1, y1, x2, y2 in of_image]
            )
    features = {
        level: torch.randn(len(boxes), channels, *size, dtype=torch.float64, requires_grad=True)
        for level, size in map_sizes.items()
    }

    teacher = distiller.teacher_features(features, gt_instances, padded_size)
    loss = distiller.distillation_loss(features, teacher, distill=True)

    loops = LoopTeacher(dict(distiller.named_parameters()), num_classes, config, padded_size)
    expected: dict[str, Tensor] = {}
    for level, feature in features.items():
        images = zip(feature, boxes, classes, masks, strict=True)
        expected[level] = torch.stack([loops.teacher_features(x, loops.objects(b, c, m)) for x, b, c, m in images])
    students = [image for feature in features.values() for image in feature]
    expected_loss = distillation_loss_in_loops(loops, students, [i for t in expected.values() for i in t])

    weights = {level: torch.randn_like(feature) for level, feature in features.items()}
    wanted = {**features, **dict(distiller.named_parameters())}
    gradients = _gradients(loss, teacher, weights, wanted)
    expected_gradients = _gradients(expected_loss, expected, weights, wanted)

    for level in features:
        _assert_close(teacher[level], expected[level], level)
    _assert_close(loss, expected_loss, "loss")
    scale = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name in wanted:
        # Some are zero in exact arithmetic (a key's bias under softmax): their rounding is judged by the scale of all.
        difference = (gradients[name] - expected_gradients[name]).abs().max()
        assert difference <= 1e-5 * expected_gradients[name].abs().max() + 1e-9 * scale, name


def _gradients(loss: Tensor, teacher: dict[str, Tensor], weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict:
    total = loss + sum((weights[level] * teacher[level]).mean() for level in weights)
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


def _assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    # Box corners are float32 in the distiller: that bounds the agreement.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), name
