"""Annotations of instance masks: whether a student needs them, whether a data set has them, and in which form.

Polygons go to detectron2 as polygons, as COCO's do in its own training. A data set with a run-length encoding among
them goes as bitmasks, which take both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from training.dataset import CocoDataset, DatasetError, detectron2_dicts

MaskFormat = Literal["polygon", "bitmask"]


def has_mask_head(detector: nn.Module) -> bool:
    """Whether the detector learns and draws instance masks."""
    return bool(getattr(getattr(detector, "roi_heads", None), "mask_on", False))


def mask_format(records: Iterable[Mapping[str, Any]]) -> MaskFormat:
    """detectron2's ``instance_mask_format`` that holds every mask of these records; crowd regions do not count."""
    masks = (entry.get("segmentation") for record in records for entry in record["annotations"] if not entry["iscrowd"])
    return "bitmask" if any(isinstance(mask, dict) for mask in masks) else "polygon"


def check_masks(detector: nn.Module, *datasets: CocoDataset) -> None:
    """Raise :class:`DatasetError` when the detector has a mask head and a data set an annotation without a mask."""
    if not has_mask_head(detector):
        return
    for dataset in datasets:
        entries = [(record, entry) for record in detectron2_dicts(dataset) for entry in record["annotations"]]
        without = [(record, entry) for record, entry in entries if "segmentation" not in entry]
        if without:
            record, entry = without[0]
            raise DatasetError(
                f"{dataset.annotation_file}: {len(without)} of {len(entries)} annotations have no usable segmentation, "
                f"first that of a {dataset.class_names[entry['category_id']]!r} at {entry['bbox']} in image id "
                f"{record['image_id']} ({record['file_name']}); the model has a mask head and expects polygons of 3 "
                "points or more, or a run-length encoding, for every object. Add them, or train a detector of boxes, "
                "such as faster_rcnn."
            )
