"""A rung's detections as a file of the artifact, in COCO's results format, and back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from export.average_precision import Segmentations
from export.signature import Detections
from training.dataset import CocoDataset


def rung_file(kind: str, rung: str, suffix: str = ".json") -> str:
    """Name of a file about a rung: ``detections``, ``ONNX Runtime`` → ``detections_onnx_runtime.json``."""
    return f"{kind}_{'_'.join(re.findall('[a-z0-9]+', rung.lower()))}{suffix}"


def detections_by_image(results_file: Path, dataset: CocoDataset) -> dict[int, Detections]:
    """Detections in COCO's results format (boxes XYWH) as :class:`Detections` of each image that has any."""
    label_of = {category_id: label for label, category_id in enumerate(dataset.category_ids)}
    return {image_id: _detections(records, label_of) for image_id, records in _records_by_image(results_file).items()}


def segmentations_by_image(results_file: Path) -> Segmentations:
    """The masks in COCO's results format, in the order of :func:`detections_by_image`."""
    return {
        image_id: [record["segmentation"] for record in records]
        for image_id, records in _records_by_image(results_file).items()
    }


def _records_by_image(results_file: Path) -> dict[int, list[dict[str, Any]]]:
    by_image: dict[int, list[dict[str, Any]]] = {}
    for record in json.loads(results_file.read_text()):
        by_image.setdefault(record["image_id"], []).append(record)
    return by_image


def _detections(records: list[dict[str, Any]], label_of: dict[int, int]) -> Detections:
    boxes = np.array([r["bbox"] for r in records], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        boxes=boxes,
        scores=np.array([r["score"] for r in records], np.float32),
        labels=np.array([label_of[r["category_id"]] for r in records], np.int32),
    )
