"""Annotation files that COCO's readers would misread or refuse, repaired in a copy.

What exporters commonly leave out or number differently has one meaning, so it is put right: annotation ids that are
missing, repeated or below 1 (pycocotools takes a match with id 0 for no match), ``iscrowd`` and ``area`` left out, a
byte-order mark, and on request boxes of zero area. Everything else that is wrong stays an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from training import coco_validation
from training.dataset import CocoDataset, described, parsed, raise_if_any


def read_repairable(
    annotation_file: Path, image_dir: Path | None = None, *, drop_degenerate_boxes: bool = False
) -> CocoDataset:
    """Like :func:`training.dataset.read_coco`, but a file that can be repaired is no error.

    Returns:
        The data set with the numbers it has once repaired, but still with the user's own ``annotation_file``. Where
        ``changes`` is not empty only :func:`repaired_copy` makes it usable.

    Raises:
        DatasetError: something is wrong that has no one right correction; names entries by the user's own ids.
    """
    annotation_file = Path(os.path.abspath(annotation_file))
    document = parsed(annotation_file)
    raise_if_any(annotation_file, coco_validation.repetition_problems(document["annotations"]))
    num_dropped = _drop_degenerate_boxes(document) if drop_degenerate_boxes else 0
    changes = [f"{num_dropped} boxes of zero area left out"] if num_dropped else []
    changes += _add_missing_fields(document["annotations"])
    dataset = described(annotation_file, image_dir, document)
    if any(coco_validation.annotation_id_problems(document["annotations"])):
        changes.append(f"annotation ids renumbered from 1 to {len(document['annotations'])}")
    encoding = coco_validation.encoding_of(annotation_file)
    if encoding != "utf-8":
        changes.append(f"encoded as utf-8 instead of {encoding}")
    return dataclasses.replace(dataset, num_dropped_boxes=num_dropped, changes=tuple(changes))


def repaired_copy(dataset: CocoDataset, path: Path) -> CocoDataset:
    """Write what ``dataset.changes`` says to ``path``; the result is the data set that reads it."""
    document = parsed(dataset.annotation_file)
    if dataset.num_dropped_boxes:
        _drop_degenerate_boxes(document)
    _add_missing_fields(document["annotations"])
    if any(coco_validation.annotation_id_problems(document["annotations"])):
        for number, entry in enumerate(document["annotations"], start=1):
            entry["id"] = number
    path.write_text(json.dumps(document), encoding="utf-8")
    return dataclasses.replace(dataset, annotation_file=path)


def _drop_degenerate_boxes(document: dict[str, Any]) -> int:
    """Take the annotations with a box of zero area out; returns how many there were."""
    annotations = document["annotations"]
    document["annotations"] = [entry for entry in annotations if not coco_validation.is_degenerate(entry.get("bbox"))]
    return len(annotations) - len(document["annotations"])


def _add_missing_fields(annotations: list[dict[str, Any]]) -> list[str]:
    """Put ``iscrowd`` and ``area`` where they are absent or null; returns what was done."""
    without_iscrowd = [entry for entry in annotations if entry.get("iscrowd") is None]
    for entry in without_iscrowd:
        entry["iscrowd"] = 0
    # A malformed box is refused as such, not for the area that cannot be computed from it.
    without_area = [entry for entry in annotations if entry.get("area") is None]
    for entry in without_area:
        box = entry.get("bbox")
        entry["area"] = box[2] * box[3] if coco_validation.is_box(box) else 0
    added = {"iscrowd 0": without_iscrowd, "area width × height": without_area}
    return [f"{field} added to {len(entries)} annotations" for field, entries in added.items() if entries]
