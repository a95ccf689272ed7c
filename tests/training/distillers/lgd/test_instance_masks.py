"""Instance masks: the crops that describe objects, and the cells that they cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from torch import Tensor, nn
from torch.nn import functional as F

from training.distillers.lgd.distiller import LgdConfig
from training.distillers.lgd.instance_masks import instance_masks, mask_crops
from training.distillers.lgd.label_encoder import object_descriptors
from training.distillers.lgd.objects import LgdInputError, ObjectBatch, box_masks, objects_from_instances

CPU = torch.device("cpu")
IMAGE_SIZE, PADDED_SIZE = (60, 90), (64, 96)
MAP_SIZES = {"p2": (16, 24), "p3": (8, 12), "odd": (5, 7), "p7": (1, 1)}


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def blobs(num_objects: int, seed: int = 0) -> list[list[np.ndarray]]:
    """Each object is one or two irregular polygons, partly outside the image."""
    random = np.random.RandomState(seed)
    objects = []
    for _ in range(num_objects):
        polygons = []
        for _ in range(random.randint(1, 3)):
            angle = np.sort(random.rand(9)) * 2 * np.pi
            x = random.rand() * 90 + random.uniform(5, 30, 9) * np.cos(angle)
            y = random.rand() * 60 + random.uniform(5, 30, 9) * np.sin(angle)
            polygons.append(np.stack([x, y], axis=1).ravel())
        objects.append(polygons)
    return objects


def image(polygons: list[list[Any]], boxes: list[list[float]] | None = None, *, bitmasks: bool = False) -> Instances:
    masks: PolygonMasks | BitMasks = PolygonMasks([[np.asarray(p, dtype=float) for p in o] for o in polygons])
    instances = Instances(IMAGE_SIZE)
    instances.gt_boxes = masks.get_bounding_boxes() if boxes is None else Boxes(torch.tensor(boxes).float())
    instances.gt_classes = torch.arange(len(polygons)) % 5
    instances.gt_masks = BitMasks.from_polygon_masks(masks, *IMAGE_SIZE) if bitmasks else masks
    return instances


def empty() -> Instances:
    """As detectron2's mapper makes it: no field for masks."""
    return Instances(IMAGE_SIZE, gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64))


def covered(gt: list[Instances], *, context_object: bool = False, grid_offset: float = 0.0) -> dict[str, Tensor]:
    return instance_masks(
        gt, PADDED_SIZE, MAP_SIZES, context_object=context_object, grid_offset=grid_offset, device=CPU
    )


def resized(polygons: list[list[np.ndarray]], size: tuple[int, int], mode: str) -> Tensor:
    """What the reference does: rasterise at the image's size, pad with zeros, resize."""
    bitmaps = torch.stack([torch.from_numpy(polygons_to_bitmask(p, *IMAGE_SIZE)) for p in polygons])
    padded = F.pad(bitmaps.float(), (0, PADDED_SIZE[1] - IMAGE_SIZE[1], 0, PADDED_SIZE[0] - IMAGE_SIZE[0]))
    return F.interpolate(padded[None], size=size, mode=mode)[0].flatten(1).bool()


@pytest.mark.parametrize("bitmasks", [False, True])
@pytest.mark.parametrize(("grid_offset", "mode"), [(0.0, "nearest"), (0.5, "nearest-exact")])
def test_cells_equal_rasterising_padding_and_resizing_the_whole_image(
    bitmasks: bool, grid_offset: float, mode: str
) -> None:
    first, second = blobs(6), blobs(3, seed=1)
    found = covered(
        [image(first, bitmasks=bitmasks), empty(), image(second, bitmasks=bitmasks)], grid_offset=grid_offset
    )
    for level, size in MAP_SIZES.items():
        assert found[level].shape == (3, 6, size[0] * size[1])
        assert torch.equal(found[level][0], resized(first, size, mode))
        assert torch.equal(found[level][2, 3:], resized(second, size, mode))
        assert not found[level][1].any(), "the stand-in of an image without objects covers nothing"
        assert not found[level][2, :3].any(), "padding covers nothing"


@pytest.mark.parametrize("bitmasks", [False, True])
def test_a_soft_mask_is_the_share_of_each_cells_pixels_that_lie_on_the_object(bitmasks: bool) -> None:
    first, second = blobs(6), blobs(3, seed=1)
    gt = [image(first, bitmasks=bitmasks), empty(), image(second, bitmasks=bitmasks)]
    sizes = {"p2": (16, 24), "p3": (8, 12), "p7": (1, 1)}
    found = instance_masks(gt, PADDED_SIZE, sizes, context_object=False, grid_offset=0.0, device=CPU, soft=True)
    for level, (height, width) in sizes.items():
        for masks, polygons in ((found[level][0], first), (found[level][2, 3:], second)):
            bitmaps = np.zeros((len(polygons), *PADDED_SIZE))
            for bitmap, polygon in zip(bitmaps, polygons, strict=True):
                bitmap[: IMAGE_SIZE[0], : IMAGE_SIZE[1]] = polygons_to_bitmask(polygon, *IMAGE_SIZE)
            cells = bitmaps.reshape(len(polygons), height, PADDED_SIZE[0] // height, width, PADDED_SIZE[1] // width)
            torch.testing.assert_close(masks, torch.from_numpy(cells.mean(axis=(2, 4))).float().flatten(1))
        assert not found[level][1].any()
        assert not found[level][2, :3].any()


def test_soft_masks_of_a_box_and_of_a_polygon_equal_to_it_agree() -> None:
    boxes = [[3.0, 5.0, 54.0, 38.0], [31.0, 17.0, 67.0, 59.0], [2.0, 42.0, 4.0, 43.0]]  # whole pixels
    gt = [image([[rectangle(*box)] for box in boxes], boxes)]
    objects = objects_from_instances(gt, PADDED_SIZE, num_classes=5, context_object=False, device=CPU)
    by_mask = instance_masks(gt, PADDED_SIZE, MAP_SIZES, context_object=False, grid_offset=0.0, device=CPU, soft=True)
    by_box = box_masks(objects, MAP_SIZES, soft=True)
    for level in ("p2", "p3", "p7"):
        torch.testing.assert_close(by_mask[level], by_box[level])
    assert by_box["p7"][0, 2].item() == pytest.approx(2 / (64 * 96)), "no object is too small to be seen"
    for level, (height, width) in MAP_SIZES.items():  # nothing is lost where cells are no whole number of pixels
        area = by_box[level][0].sum(dim=-1) * (PADDED_SIZE[0] / height) * (PADDED_SIZE[1] / width)
        torch.testing.assert_close(area, torch.tensor([(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes]))


def test_with_a_context_object_the_last_slot_covers_every_cell_of_every_image() -> None:
    found = covered([image(blobs(2)), empty()], context_object=True)
    for level in MAP_SIZES:
        assert found[level][:, -1].all()
        assert torch.equal(found[level][0, :-1], covered([image(blobs(2))])[level][0])
        assert not found[level][1, :-1].any()


@pytest.mark.parametrize("grid_offset", [0.0, 0.5])
def test_a_polygon_equal_to_its_box_covers_the_boxes_cells_but_for_those_within_a_pixel_of_an_edge(
    grid_offset: float,
) -> None:
    corners = torch.rand(60, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    boxes = (corners * torch.tensor([90.0, 60.0])).flatten(1).tolist()
    by_mask = covered([image([[rectangle(*box)] for box in boxes], boxes)], grid_offset=grid_offset)
    gt = [image([[rectangle(*box)] for box in boxes], boxes)]
    objects = objects_from_instances(gt, PADDED_SIZE, num_classes=5, context_object=False, device=CPU)
    by_box = box_masks(objects, MAP_SIZES, grid_offset=grid_offset)

    num_compared = num_inside = 0
    for level, (map_height, map_width) in MAP_SIZES.items():
        for index, (x1, y1, x2, y2) in enumerate(boxes):
            for cell, (ours, theirs) in enumerate(zip(by_mask[level][0, index], by_box[level][0, index], strict=True)):
                x = (cell % map_width + grid_offset) * PADDED_SIZE[1] / map_width
                y = (cell // map_width + grid_offset) * PADDED_SIZE[0] / map_height
                if min(abs(x - x1), abs(x - x2), abs(y - y1), abs(y - y2)) > 1:
                    assert ours == theirs, (level, index, cell)
                    num_compared, num_inside = num_compared + 1, num_inside + int(ours)
    assert num_inside > 1000
    assert num_compared > 0.7 * sum(mask.numel() for mask in by_box.values())


def test_where_the_cells_agree_the_teacher_paints_the_same_from_polygons_as_from_boxes() -> None:
    # Edges half-way between the cells of every level: no cell is within a pixel of one.
    boxes = [[2.0, 2.0, 54.0, 38.0], [30.0, 18.0, 66.0, 58.0], [2.0, 42.0, 26.0, 54.0]]
    sizes = {"p2": (16, 24), "p3": (8, 12)}
    gt = [image([[rectangle(*box)] for box in boxes], boxes)]
    objects = objects_from_instances(gt, PADDED_SIZE, num_classes=5, context_object=True, device=CPU)
    teacher = LgdConfig().build(channels=16, num_classes=5, level_names=list(sizes)).implicit_teacher
    generator = torch.Generator().manual_seed(0)
    features = {level: torch.randn(1, 16, *size, generator=generator) for level, size in sizes.items()}

    def painted(masks: dict[str, Tensor]) -> dict[str, Tensor]:
        return teacher(features, objects, {level: mask.float() for level, mask in masks.items()})

    by_mask = painted(instance_masks(gt, PADDED_SIZE, sizes, context_object=True, grid_offset=0.0, device=CPU))
    by_box = painted(box_masks(objects, sizes))
    nothing = painted({level: torch.zeros_like(mask) for level, mask in box_masks(objects, sizes).items()})
    for level in sizes:
        torch.testing.assert_close(by_mask[level], by_box[level])
        assert (by_mask[level] - nothing[level]).abs().max() > 0.1


def inside(x: float, y: float, polygon: list[float]) -> bool:
    """Even-odd rule: a ray to the right crosses the outline an odd number of times."""
    corners = list(zip(polygon[0::2], polygon[1::2], strict=True))
    crossings = 0
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            crossings += 1
    return crossings % 2 == 1


L_SHAPE = [10, 4, 66, 4, 66, 20, 34, 20, 34, 60, 10, 60]
CROPPED = {
    "an L": ([10, 4, 66, 60], L_SHAPE),
    "all of its box": ([20, 10, 40, 30], rectangle(20, 10, 40, 30)),
    "a box beyond the padded image": ([-40, 0, 30, 70], rectangle(-10, 10, 30, 50)),
    "a box that touches the padded image's last pixels": ([26, 8, 96, 64], rectangle(56, 16, 96, 64)),
}


@pytest.mark.parametrize("bitmasks", [False, True])
def test_a_crop_is_the_mask_within_the_unclamped_box_cell_by_cell(bitmasks: bool) -> None:
    boxes, polygons = zip(*CROPPED.values(), strict=True)
    if bitmasks:  # a bitmap ends with the image
        boxes, polygons = boxes[:2], polygons[:2]
    gt = image([[p] for p in polygons], [list(b) for b in boxes], bitmasks=bitmasks)
    crops = mask_crops([gt], context_object=False, device=CPU)

    for crop, (x1, y1, x2, y2), polygon in zip(crops[0], boxes, polygons, strict=True):
        expected = [
            float(inside(x1 + (column + 0.5) * (x2 - x1) / 7, y1 + (row + 0.5) * (y2 - y1) / 7, polygon))
            for row in range(7)
            for column in range(7)
        ]
        assert crop.tolist() == expected


def test_descriptors_end_with_the_crop_as_plus_and_minus_one() -> None:
    gt = [image([[L_SHAPE], [rectangle(20, 10, 40, 30)]]), empty()]
    collected = objects_from_instances(gt, PADDED_SIZE, num_classes=5, context_object=True, device=CPU)
    crops = mask_crops(gt, context_object=True, device=CPU)
    without = object_descriptors(collected, 5)
    descriptors = object_descriptors(ObjectBatch(**{**vars(collected), "mask_crops": crops}), 5)

    assert descriptors.shape == (2, 3, 4 + 5 + 49)
    assert torch.equal(descriptors[..., :9], without)
    assert descriptors[0, 0, 9:].unflatten(0, (7, 7)).tolist() == [[1] * 7] * 2 + [[1] * 3 + [-1] * 4] * 5
    assert (descriptors[0, 1, 9:] == 1).all()
    assert (descriptors[0, 2, 9:] == 1).all(), "the context object"
    assert (descriptors[1, 2, 9:] == -1).all(), "the stand-in of an image without objects"
    assert (descriptors[1, :2, 9:] == -1).all(), "padding"


def test_with_masks_the_parts_have_the_parameters_of_the_paper() -> None:
    def count(part: nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    distiller = LgdConfig(use_masks=True).build(channels=256, num_classes=80, level_names=["p2"])
    assert count(distiller.implicit_teacher) == 11_043_289
    assert count(distiller.implicit_teacher.label_encoder) == 7_632_345
    assert count(distiller.adapter) == 1_770_240


def test_labels_without_masks_are_refused_and_images_without_objects_are_not(labels: Callable[..., Any]) -> None:
    distiller = LgdConfig(use_masks=True).build(channels=8, num_classes=5, level_names=["p4"])
    features = {"p4": torch.zeros(2, 8, 4, 6)}
    distiller.teacher_features(features, [empty(), image(blobs(1))], PADDED_SIZE)
    with pytest.raises(LgdInputError, match=r"use_masks is true, but the instance masks of image 1 .* have none"):
        distiller.teacher_features(features, [empty(), labels([[1, 1, 9, 9]], [0], IMAGE_SIZE)], PADDED_SIZE)
    wrong = image(blobs(1))
    wrong.gt_masks = torch.zeros(1, *IMAGE_SIZE)
    with pytest.raises(LgdInputError, match=r"masks of image 0 of the batch are Tensor; expected polygons or bitmasks"):
        distiller.teacher_features(features, [wrong, empty()], PADDED_SIZE)


@pytest.mark.parametrize("context_object", [True, False])
def test_empty_and_invisible_masks_give_finite_features_and_gradients(context_object: bool) -> None:
    distiller = LgdConfig(use_masks=True, context_object=context_object).build(
        channels=8, num_classes=5, level_names=["p4", "p5"]
    )
    features = {"p4": torch.randn(2, 8, 4, 6), "p5": torch.randn(2, 8, 2, 3)}
    nothing = image([[rectangle(20, 20, 20, 20)], [rectangle(200, 200, 220, 220)]], [[20, 20, 20, 20], [5, 5, 9, 9]])
    teacher = distiller.teacher_features(features, [nothing, empty()], PADDED_SIZE)
    torch.cat([(t**3).flatten() for t in teacher.values()]).sum().backward()
    for name, parameter in distiller.implicit_teacher.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_soft_masks_and_a_grid_offset_exclude_each_other() -> None:
    with pytest.raises(LgdInputError, match="exclude each other"):
        LgdConfig(soft_masks=True, grid_offset=0.5)


def test_an_unknown_grid_offset_is_refused() -> None:
    with pytest.raises(LgdInputError, match=r"grid_offset is 0\.25; it must be 0 or 0\.5"):
        LgdConfig(grid_offset=0.25)
