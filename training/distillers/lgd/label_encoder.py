"""Label encoder of LGD (section 3.1 of the paper): boxes and classes to one embedding per object, as in PointNet.

Shapes: N images, M object slots per image, K classes, D = 4 + K descriptor length (53 + K with masks), C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.distillers.lgd.instance_masks import CROP_CELLS
from training.distillers.lgd.normalization import normalize_vectors
from training.distillers.lgd.objects import ObjectBatch

LOCAL_CHANNELS = 64
"""Width of the per-object feature; with the widths below, the PointNet's own."""

GLOBAL_CHANNELS = 1024
"""Width of the per-image feature, the maximum over the image's objects."""


def object_descriptors(objects: ObjectBatch, num_classes: int) -> Tensor:
    """Each object as a vector in [-1, 1]: (x1, y1, x2, y2) by the padded size, one-hot class, crop of its mask if any.

    The affine map to [-1, 1] covers the class code too, so an object without a class has -1 throughout.

    Returns:
        (N, M, D).
    """
    height, width = objects.padded_size
    corners = torch.stack((objects.boxes[..., 0::2] / width, objects.boxes[..., 1::2] / height), dim=-1).flatten(-2)
    # Written as a comparison because F.one_hot knows no "none of them".
    class_code = objects.classes[..., None] == torch.arange(num_classes, device=objects.classes.device)
    parts = [corners, class_code.to(corners.dtype)]
    if objects.mask_crops is not None:
        parts.append(objects.mask_crops)
    return 2 * torch.cat(parts, dim=-1) - 1


class NormalizedLinear(nn.Linear):
    """Linear layer, layer normalisation over its outputs, ReLU; (..., in) -> (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(normalize_vectors(super().forward(x)))


class TransformNet(nn.Module):
    """A square matrix for each object from the object's own vector, applied to it; (..., D) -> (..., D).

    Deviation from PointNet, as in the reference: the matrix is made per object, not per set, and no identity is added.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.matrix = nn.Sequential(
            NormalizedLinear(channels, 64),
            NormalizedLinear(64, 128),
            NormalizedLinear(128, 1024),
            NormalizedLinear(1024, 512),
            NormalizedLinear(512, 256),
            nn.Linear(256, channels**2),
        )

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix(x).unflatten(-1, (self.channels, self.channels))
        return (x.unsqueeze(-2) @ matrix).squeeze(-2)


class LabelEncoder(nn.Module):
    """Labels of a batch -> (N, M, C) label embeddings, each aware of all objects of its own image.

    Args:
        use_masks: The batches carry crops of the objects' masks.
        residual: Add a linear map of each descriptor to its embedding.
    """

    def __init__(self, *, channels: int, num_classes: int, use_masks: bool = False, residual: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        num_inputs = 4 + num_classes + (CROP_CELLS**2 if use_masks else 0)
        self.local = nn.Sequential(
            TransformNet(num_inputs), NormalizedLinear(num_inputs, LOCAL_CHANNELS), TransformNet(LOCAL_CHANNELS)
        )
        self.wide = nn.Sequential(
            NormalizedLinear(LOCAL_CHANNELS, 128),
            NormalizedLinear(128, GLOBAL_CHANNELS),
        )
        self.embedding = NormalizedLinear(LOCAL_CHANNELS + GLOBAL_CHANNELS, channels)
        self.shortcut = nn.Linear(num_inputs, channels) if residual else None

    def forward(self, objects: ObjectBatch) -> Tensor:
        # Float32 throughout: two products with predicted matrices amplify rounding, and the whole costs little.
        with torch.autocast(objects.boxes.device.type, enabled=False):
            descriptors = object_descriptors(objects, self.num_classes).to(self.embedding.weight.dtype)
            local = self.local(descriptors)
            # Padding counts as 0 in the maximum, which is exact: the wide features end in a ReLU.
            wide = self.wide(local).masked_fill(~objects.is_object[..., None], 0.0)
            image_wide = wide.amax(dim=1, keepdim=True).expand_as(wide)
            embedding: Tensor = self.embedding(torch.cat((local, image_wide), dim=-1))
            if self.shortcut is not None:
                embedding = embedding + self.shortcut(descriptors)
        return embedding
