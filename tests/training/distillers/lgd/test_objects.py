"""Labels as padded tensors, and the cells that boxes cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from training.distillers.lgd.label_encoder import object_descriptors
from training.distillers.lgd.objects import NO_CLASS, LgdInputError, ObjectBatch, box_masks, objects_from_instances

CPU = torch.device("cpu")
SIZE = (64, 96)


def _collect(gt_instances: list[Any], *, context_object: bool) -> ObjectBatch:
    return objects_from_instances(gt_instances, SIZE, num_classes=5, context_object=context_object, device=CPU)


def test_the_context_object_is_the_last_of_its_image_and_padding_comes_first(labels: Callable[..., Any]) -> None:
    batch = _collect([labels([[1, 2, 3, 4], [5, 6, 7, 8]], [4, 0]), labels([[9, 9, 20, 20]], [3])], context_object=True)

    assert batch.is_object.tolist() == [[True, True, True], [False, True, True]]
    assert batch.classes.tolist() == [[4, 0, NO_CLASS], [NO_CLASS, 3, NO_CLASS]]
    assert batch.boxes[0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 95, 63]]
    assert batch.boxes[1, 1:].tolist() == [[9, 9, 20, 20], [0, 0, 95, 63]]


@pytest.mark.parametrize("context_object", [True, False])
def test_an_image_without_objects_has_one_stand_in_and_no_context(
    labels: Callable[..., Any], context_object: bool
) -> None:
    batch = _collect([labels([], [])], context_object=context_object)

    assert batch.boxes.tolist() == [[[0, 0, 1, 1]]]
    assert batch.classes.tolist() == [[NO_CLASS]]
    assert batch.is_object.tolist() == [[True]]


def test_boxes_are_clamped_to_the_last_pixel_of_the_padded_image(labels: Callable[..., Any]) -> None:
    batch = _collect([labels([[-5, -1, 96, 64]], [0])], context_object=False)
    assert batch.boxes.tolist() == [[[0, 0, 95, 63]]]


@pytest.mark.parametrize("class_id", [5, -1, 80])
def test_a_class_id_out_of_range_is_refused(labels: Callable[..., Any], class_id: int) -> None:
    with pytest.raises(LgdInputError, match=rf"image 1 of the batch hold class id {class_id}.*5 classes") as error:
        _collect([labels([[0, 0, 9, 9]], [0]), labels([[0, 0, 9, 9]], [class_id])], context_object=True)
    assert isinstance(error.value, ValueError)
    assert error.value.exit_code == 2


def test_descriptors_lie_in_minus_one_to_one_and_hold_the_class_one_hot(labels: Callable[..., Any]) -> None:
    batch = _collect([labels([[24, 16, 48, 32]], [2])], context_object=True)
    descriptors = object_descriptors(batch, num_classes=5)

    assert descriptors[0, 0].tolist() == [-0.5, -0.5, 0, 0, -1, -1, 1, -1, -1]
    torch.testing.assert_close(
        descriptors[0, 1], torch.tensor([-1, -1, 2 * 95 / 96 - 1, 2 * 63 / 64 - 1, -1, -1, -1, -1, -1])
    )


def test_masks_equal_a_test_of_every_cell(labels: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(40, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([110.0, 70.0]) - 5
    batch = _collect([labels(corners.flatten(1), [0] * 40)], context_object=True)
    sizes = {"p2": (16, 24), "p4": (4, 6), "odd": (5, 7), "p7": (1, 1)}
    masks = box_masks(batch, sizes)

    for level, (map_height, map_width) in sizes.items():
        assert masks[level].shape == (1, 41, map_height * map_width)
        for (x1, y1, x2, y2), mask in zip(batch.boxes[0].tolist(), masks[level][0], strict=True):
            x1, x2, y1, y2 = x1 * map_width / 96, x2 * map_width / 96, y1 * map_height / 64, y2 * map_height / 64
            expected = [
                float(abs(column - (x1 + x2) / 2) <= (x2 - x1) / 2 and abs(row - (y1 + y2) / 2) <= (y2 - y1) / 2)
                for row in range(map_height)
                for column in range(map_width)
            ]
            assert mask.tolist() == expected
        assert masks[level][0, -1].all(), "the context object covers every cell"


@pytest.mark.parametrize("box", [[30, 30, 30, 30], [10, 10, 10, 50], [9, 9, 15, 15], [500, 500, 600, 600]])
def test_boxes_without_area_or_between_the_cells_cover_nothing(labels: Callable[..., Any], box: list[int]) -> None:
    batch = _collect([labels([box], [0])], context_object=False)
    assert not box_masks(batch, {"p3": (4, 6)})["p3"].any()


def test_padding_covers_nothing_whatever_its_box_holds() -> None:
    boxes = torch.tensor([0.0, 0.0, 95.0, 63.0]).expand(1, 2, 4)
    is_object = torch.tensor([[False, True]])
    batch = ObjectBatch(boxes=boxes, classes=torch.zeros(1, 2), is_object=is_object, padded_size=SIZE)
    masks = box_masks(batch, {"p3": (8, 12)})["p3"]
    assert not masks[0, 0].any()
    assert masks[0, 1].all()
