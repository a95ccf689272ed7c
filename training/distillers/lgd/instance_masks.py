"""Instance masks in LGD: an object's shape in its descriptor, and the cells of each feature map that the shape covers.

Shapes: N images, M object slots per image (filled from the right, as in `objects`), n objects of one image,
(H, W) size of an image in pixels, (Hp, Wp) of the padded batch, (Hl, Wl) of a feature map.

Both of detectron2's mask formats serve. Everything is computed where the labels are and moved to the device once.
Polygons are rasterised once a step, object by object: about 1.1 ms each at 800 x 1333 pixels on one core, by far the
most of the work here, and done while a GPU is busy with the student's forward pass. Bitmasks (the loader's
`instance_mask_format="bitmask"`) move that work into the loader's processes, for a byte per pixel and object in their
queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from torch import Tensor
from torch.nn import functional as F

from training.distillers.lgd.objects import LgdInputError, in_slots, on_device

CROP_CELLS = 7
"""Side of the crop of its mask that an object's descriptor holds."""


def mask_crops(gt_instances: Sequence[Instances], *, context_object: bool, device: torch.device) -> Tensor:
    """Each object's mask within its box (as labelled, not clamped), resized to 7 x 7: (N, M, 49) of zeros and ones.

    Ones for the context object; zeros for the stand-in of an image without objects, and for padding.

    Raises:
        LgdInputError: An image has objects and no masks.
    """
    crops = []
    for index, instances in enumerate(gt_instances):
        if not len(instances):
            crops.append(torch.zeros(1, CROP_CELLS**2, device=instances.gt_boxes.device))
            continue
        crop = _masks_of(instances, index).crop_and_resize(instances.gt_boxes.tensor, CROP_CELLS).flatten(1).float()
        crops.append(F.pad(crop, (0, 0, 0, int(context_object)), value=1.0))
    return on_device(in_slots(crops), device)


def instance_masks(
    gt_instances: Sequence[Instances],
    padded_size: tuple[int, int],
    map_sizes: Mapping[str, tuple[int, int]],
    *,
    context_object: bool,
    grid_offset: float,
    device: torch.device,
    soft: bool = False,
) -> dict[str, Tensor]:
    """Which cells of each feature map lie on each object's mask: {level: (N, M, Hl * Wl)}, bool or shares in [0, 1].

    Equal to rasterising at (H, W), padding with zeros to (Hp, Wp) and resizing by the nearest neighbour, but reads only
    the pixels that the resizing keeps. The stand-in of an image without objects covers nothing.

    Deviation: the context object covers the padding too, as its box does when boxes are painted; the reference code
    leaves the padding out here. No published configuration has both masks and a context object.

    Args:
        grid_offset: Where in a cell its pixel is taken: 0 is the reference's "nearest", 0.5 the cell's middle.
        soft: The share of each cell that the mask covers: resizing by area instead.

    Raises:
        LgdInputError: An image has objects and no masks.
    """
    masks: dict[str, list[Tensor]] = {level: [] for level in map_sizes}
    for index, instances in enumerate(gt_instances):
        sampled = (
            _averaged(instances, index, padded_size, list(map_sizes.values()))
            if soft
            else _sampled(instances, index, padded_size, list(map_sizes.values()), grid_offset)
        )
        for level, at_cells in zip(map_sizes, sampled, strict=True):
            has_extra = context_object or not len(instances)
            masks[level].append(F.pad(at_cells.flatten(1), (0, 0, 0, int(has_extra)), value=context_object))
    return {level: on_device(in_slots(of_images), device) for level, of_images in masks.items()}


def _sampled(
    instances: Instances,
    index: int,
    padded_size: tuple[int, int],
    map_sizes: Sequence[tuple[int, int]],
    grid_offset: float,
) -> list[Tensor]:
    """One image's masks at the cells of each map: (n, Hl, Wl) bool, where its boxes are."""
    labels_device = instances.gt_boxes.device
    if not len(instances):
        return [torch.zeros(0, *size, dtype=torch.bool, device=labels_device) for size in map_sizes]
    masks = _masks_of(instances, index)
    # Indices are made and counted on the CPU, whose counting costs no synchronisation.
    pixels = [
        tuple(
            on_device(_pixels_of_cells(num_padded, num_cells, grid_offset, num_pixels), masks.device)
            for num_pixels, num_padded, num_cells in zip(instances.image_size, padded_size, map_size, strict=True)
        )
        for map_size in map_sizes
    ]
    if isinstance(masks, BitMasks):
        sampled = [masks.tensor[:, rows[:, None], columns] for rows, columns in pixels]
    else:
        bitmaps = (torch.from_numpy(polygons_to_bitmask(p, *instances.image_size)) for p in masks.polygons)
        of_objects = [[bitmap[rows[:, None], columns] for rows, columns in pixels] for bitmap in bitmaps]
        sampled = [torch.stack(of_level) for of_level in zip(*of_objects, strict=True)]
    return [
        F.pad(on_device(at_cells, labels_device), (0, map_width - at_cells.shape[2], 0, map_height - at_cells.shape[1]))
        for at_cells, (map_height, map_width) in zip(sampled, map_sizes, strict=True)
    ]


def _averaged(
    instances: Instances, index: int, padded_size: tuple[int, int], map_sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """The share of each cell of each map that one image's masks cover: (n, Hl, Wl), where its boxes are."""
    labels_device = instances.gt_boxes.device
    if not len(instances):
        return [torch.zeros(0, *size, device=labels_device) for size in map_sizes]
    masks = _masks_of(instances, index)
    if isinstance(masks, BitMasks):
        bitmaps = masks.tensor
    else:
        rasters = [torch.from_numpy(polygons_to_bitmask(p, *instances.image_size)) for p in masks.polygons]
        bitmaps = torch.stack(rasters)
    (height, width), (padded_height, padded_width) = instances.image_size, padded_size
    padded = F.pad(bitmaps.float(), (0, padded_width - width, 0, padded_height - height))
    return [on_device(F.interpolate(padded[None], size=size, mode="area")[0], labels_device) for size in map_sizes]


def _pixels_of_cells(num_padded: int, num_cells: int, grid_offset: float, num_pixels: int) -> Tensor:
    """The pixel that nearest-neighbour resizing from `num_padded` takes for each cell, those within `num_pixels`."""
    mode = "nearest-exact" if grid_offset else "nearest"
    # By the operation itself, so that its rounding is the resizing's own.
    pixels = F.interpolate(torch.arange(num_padded, dtype=torch.float32)[None, None], size=num_cells, mode=mode)
    pixels = pixels.flatten().long()
    return pixels[pixels < num_pixels]


def _masks_of(instances: Instances, index: int) -> BitMasks | PolygonMasks:
    masks = instances.gt_masks if instances.has("gt_masks") else None
    if not isinstance(masks, BitMasks | PolygonMasks):
        found = "have none" if masks is None else f"are {type(masks).__name__}"
        raise LgdInputError(
            f"distiller.use_masks is true, but the instance masks of image {index} of the batch {found}; expected "
            "polygons or bitmasks in gt_masks for every image with objects. Train a detector with masks on annotations "
            "that have a segmentation for every object, or set distiller.use_masks=false."
        )
    return masks
