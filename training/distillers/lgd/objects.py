"""The labelled objects of a batch as padded tensors, and the cells of each feature map that they cover.

Shapes: N images, M object slots per image, (Hp, Wp) size of the padded batch in pixels, (Hl, Wl) size of a feature map.

Slots are filled from the right, so that the last slot of every image is always taken: by the context object (the whole
image) where there is one. Every image thus has at least one object and no attention row or maximum is ever empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

NO_CLASS = -1
"""Class of the context object, of the stand-in of an image without objects, and of padding: an all-zero class code."""


class LgdInputError(ValueError):
    """The recipe, the labels or the pyramid do not fit what the distiller was built for."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class ObjectBatch:
    """The objects of all images of a batch.

    Attributes:
        boxes: (N, M, 4) xyxy pixels of the padded image, within [0, Wp - 1] x [0, Hp - 1].
        classes: (N, M) class ids, `NO_CLASS` where there is none.
        is_object: (N, M) True for an object, False for padding.
        padded_size: (Hp, Wp).
        mask_crops: (N, M, 49) each object's mask within its box, zeros and ones; None where masks are not used.
    """

    boxes: Tensor
    classes: Tensor
    is_object: Tensor
    padded_size: tuple[int, int]
    mask_crops: Tensor | None = None


def objects_from_instances(
    gt_instances: Sequence[Instances],
    padded_size: tuple[int, int],
    *,
    num_classes: int,
    context_object: bool,
    device: torch.device,
) -> ObjectBatch:
    """Collect the labels of a batch, clamped to the padded image.

    With `context_object` each image with objects gets one more, last: the whole padded image, without a class. An image
    without objects is represented by a single box (0, 0, 1, 1) without a class, in the last slot.

    The tensors are assembled where the labels are and moved once: labels on the CPU cost no synchronisation.

    Raises:
        LgdInputError: A class id is outside [0, num_classes).
    """
    _require_known_classes(gt_instances, num_classes)
    height, width = padded_size
    boxes, classes = [], []
    for instances in gt_instances:
        image_boxes, image_classes = instances.gt_boxes.tensor.detach().float(), instances.gt_classes
        if context_object or not len(instances):
            # Filled, not copied from a list, which would make the host wait for the device where the labels are there.
            extra = image_boxes.new_zeros(1, 4)
            extra[:, 2] = width if len(instances) else 1
            extra[:, 3] = height if len(instances) else 1
            image_boxes = torch.cat((image_boxes, extra))
            image_classes = F.pad(image_classes, (0, 1), value=NO_CLASS)
        boxes.append(image_boxes)
        classes.append(image_classes)
    padded_boxes = in_slots(boxes)
    x = padded_boxes[..., 0::2].clamp(0, width - 1)
    y = padded_boxes[..., 1::2].clamp(0, height - 1)
    return ObjectBatch(
        boxes=on_device(torch.stack((x, y), dim=-1).flatten(-2), device),
        classes=on_device(in_slots(classes, NO_CLASS), device),
        is_object=on_device(in_slots([torch.ones_like(c, dtype=torch.bool) for c in classes]), device),
        padded_size=padded_size,
    )


def in_slots(of_images: Sequence[Tensor], padding: float = 0) -> Tensor:
    """Each image's (n, ...) objects in the last of M slots: (N, M, ...)."""
    return pad_sequence(list(of_images), batch_first=True, padding_value=padding, padding_side="left")


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the host does not wait for what the device is doing."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def box_masks(
    objects: ObjectBatch, map_sizes: Mapping[str, tuple[int, int]], *, grid_offset: float = 0.0, soft: bool = False
) -> dict[str, Tensor]:
    """Which cells of each feature map lie inside each object's box: {level: (N, M, Hl * Wl)}, bool or shares in [0, 1].

    A box is scaled by the true ratio Wl / Wp. One smaller than a cell may cover none, and one without area covers none
    (the quotient is NaN or infinite).

    Args:
        grid_offset: Where in a cell its point is. 0 is the reference's: a cell is its integer index, half a cell beside
            detectron2's pixel centres, which 0.5 stands for.
        soft: The share of each cell that the box covers, which knows the box's edges to a fraction of a cell.
    """
    height, width = objects.padded_size
    masks = {}
    for level, (map_height, map_width) in map_sizes.items():
        across = objects.boxes[..., 0::2] * (map_width / width)
        down = objects.boxes[..., 1::2] * (map_height / height)
        if soft:
            x, y = _shares_of_cells(across, map_width), _shares_of_cells(down, map_height)
        else:
            x, y = _cells_inside(across, map_width, grid_offset), _cells_inside(down, map_height, grid_offset)
        masks[level] = (y[..., :, None] * x[..., None, :] * objects.is_object[..., None, None]).flatten(-2)
    return masks


def _cells_inside(interval: Tensor, num_cells: int, grid_offset: float) -> Tensor:
    """(N, M, 2) intervals in cells -> (N, M, num_cells), True where a cell is within half an extent of the centre."""
    start, end = interval[..., 0:1], interval[..., 1:2]
    cell = torch.arange(num_cells, device=interval.device) + grid_offset
    return ((start + end) * 0.5 - cell).abs() / (end - start) <= 0.5


def _shares_of_cells(interval: Tensor, num_cells: int) -> Tensor:
    """(N, M, 2) intervals in cells -> (N, M, num_cells), how much of each cell [i, i + 1] lies in the interval."""
    cell = torch.arange(num_cells, device=interval.device)
    return (torch.minimum(interval[..., 1:2], cell + 1) - torch.maximum(interval[..., 0:1], cell)).clamp(min=0)


def _require_known_classes(gt_instances: Sequence[Instances], num_classes: int) -> None:
    for index, instances in enumerate(gt_instances):
        classes = instances.gt_classes
        is_unknown = (classes < 0) | (classes >= num_classes)
        if classes.is_cuda:
            # Reading the answer would make the host wait for the device in every step.
            torch._assert_async(
                ~is_unknown.any(), f"a class id is outside [0, {num_classes}) (the distiller's classes)"
            )
        elif is_unknown.any():
            raise LgdInputError(
                f"labels of image {index} of the batch hold class id {int(classes[is_unknown][0])}, but the distiller "
                f"was built for {num_classes} classes, ids 0 to {num_classes - 1}. Make the model's number of classes "
                "equal to the data set's."
            )
