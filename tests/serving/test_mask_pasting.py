"""Masks in numpy against detectron2's own pasting and pycocotools' own encoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.layers.mask_ops import paste_masks_in_image
from pycocotools import mask as coco_mask

from export.signature import Detections
from serving.mask_pasting import cropped_mask, mask_in_image, masks_in_image, run_lengths
from serving.preprocessing import Placement, detections_in_image

HEIGHT, WIDTH, SIZE = 90, 130, 28


def random_detections(num: int, seed: int = 0) -> Detections:
    """Smooth masks in boxes of all sizes, some beyond the image's border and some thinner than a pixel."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 1, (num, 2, 2)) * [WIDTH, HEIGHT]
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    boxes[0] = [0, 0, WIDTH, HEIGHT]
    boxes[1, 2] = boxes[1, 0] + 0.3
    coarse = torch.from_numpy(generator.normal(0, 3, (num, 1, 5, 5)).astype(np.float32))
    masks = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")[:, 0].sigmoid().numpy()
    return Detections(
        boxes=boxes, scores=np.linspace(1, 0.1, num).astype(np.float32), labels=np.zeros(num, np.int32), masks=masks
    )


def test_a_mask_is_drawn_as_detectron2_draws_it() -> None:
    found = random_detections(40)
    expected = paste_masks_in_image(torch.from_numpy(found.masks), torch.from_numpy(found.boxes), (HEIGHT, WIDTH))
    drawn = np.stack(list(masks_in_image(found, HEIGHT, WIDTH)))
    assert drawn.dtype == bool
    assert expected.sum() > 20_000
    # A pixel whose probability is 0.5 to the last bit may fall either way.
    assert (drawn != expected.numpy()).sum() <= 2


def test_a_detector_of_boxes_draws_nothing() -> None:
    found = random_detections(3)
    without = Detections(boxes=found.boxes, scores=found.scores, labels=found.labels)
    assert list(masks_in_image(without, HEIGHT, WIDTH)) == []


@pytest.mark.parametrize("first", [False, True])
def test_run_lengths_are_cocos(first: bool) -> None:
    mask = np.random.default_rng(0).random((17, 23)) > 0.7
    mask[0, 0] = first
    encoded = run_lengths(mask)
    assert sum(encoded["counts"]) == mask.size
    compressed = coco_mask.frPyObjects(encoded, *encoded["size"])
    np.testing.assert_array_equal(coco_mask.decode(compressed).astype(bool), mask)
    for full in (np.zeros((4, 5), bool), np.ones((4, 5), bool)):
        compressed = coco_mask.frPyObjects(run_lengths(full), 4, 5)
        np.testing.assert_array_equal(coco_mask.decode(compressed).astype(bool), full)


def test_a_mask_cut_off_with_its_box_shows_the_same_pixels() -> None:
    """A box that reaches into the padding: drawn whole on the larger canvas, or cut off and drawn in the image."""
    found = random_detections(60)
    placement = Placement(image_height=60, image_width=100, scale_x=1.0, scale_y=1.0)
    inside = detections_in_image(found, placement)
    kept = [i for i, box in enumerate(found.boxes) if box[0] < 100 and box[1] < 60]
    assert len(inside) == len(kept)
    assert inside.masks is not None
    num_cut = num_pixels = num_wrong = 0
    for drawn, i in zip(masks_in_image(inside, 60, 100), kept, strict=True):
        whole = mask_in_image(found.masks[i], found.boxes[i], HEIGHT, WIDTH)[:60, :100]
        num_wrong += int((whole != drawn).sum())
        num_pixels += int(whole.sum())
        num_cut += bool(found.boxes[i][2] > 100 or found.boxes[i][3] > 60)
    assert num_cut > 10
    assert num_wrong < 0.02 * num_pixels, (num_wrong, num_pixels)


def test_a_mask_of_the_whole_box_is_itself() -> None:
    found = random_detections(5)
    for mask, box in zip(found.masks, found.boxes, strict=True):
        np.testing.assert_allclose(cropped_mask(mask, box, box), mask, atol=1e-5)


def test_masks_follow_their_detections_through_scaling_and_filtering() -> None:
    found = random_detections(6)
    placement = Placement(image_height=2 * HEIGHT, image_width=3 * WIDTH, scale_x=3.0, scale_y=2.0)
    scaled = detections_in_image(found, placement)
    np.testing.assert_array_equal(scaled.masks, found.masks)
    above = found.above(0.5)
    assert len(above) == 3
    np.testing.assert_array_equal(above.masks, found.masks[:3])
