"""The images that changed most from one rung to the next, drawn with the boxes of both, as files of the artifact."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from export.ladder import Measured
from pipeline.detection_files import rung_file
from pipeline.report.gallery import JPEG_QUALITY, captions_of, draw_boxes, draw_masks, panel_scale, side_by_side
from serving.preprocessing import read_image
from training.dataset import CocoDataset, detectron2_dicts

MAX_PICTURES = 12
MAX_DRAWN = 30  # detections of a panel, the best: more hide each other and the image


def draw_changed_images(
    rows: Iterable[Mapping[str, Any]],
    measured: Mapping[str, Measured],
    dataset: CocoDataset,
    directory: Path,
    *,
    score_floor: float,
) -> list[dict[str, Any]]:
    """Write at most a dozen JPEGs: the most changed image of each step first, then the second of each, and so on.

    Args:
        rows: of the rungs, those whose pictures matter most first.
        measured: of all rungs, and of those that they are compared with.
        score_floor: what is not above it is not drawn; of the rest the best.

    Returns:
        Of each picture its file, the rungs on its left and right, the image and its change.
    """
    files = {record["image_id"]: Path(record["file_name"]) for record in detectron2_dicts(dataset)}
    changes = [[(row, changed) for changed in row["changed_images"]] for row in rows]
    in_turn = (entry for turn in itertools.zip_longest(*changes) for entry in turn if entry is not None)
    drawn = []
    for row, changed in itertools.islice(in_turn, MAX_PICTURES):
        image_id, rungs = changed["image_id"], (row["compared_with"], row["name"])
        name = rung_file("changed", row["name"], f"_{image_id}.jpg")
        picture = Image.fromarray(read_image(files[image_id]))
        panels = [_panel(picture, rung, measured[rung], image_id, score_floor, dataset.class_names) for rung in rungs]
        side_by_side(panels).save(directory / name, quality=JPEG_QUALITY, optimize=True)
        drawn.append({"file": name, "rung": rungs[1], "compared_with": rungs[0], **changed})
    return drawn


def _panel(
    picture: Image.Image, rung: str, found: Measured, image_id: int, score_floor: float, class_names: Sequence[str]
) -> tuple[str, Image.Image]:
    """What the rung found on the image, drawn on it, and what to write above it."""
    detections = found.found.get(image_id)
    if detections is None:
        return f"{rung}: 0", draw_boxes(picture, np.zeros((0, 4)), np.zeros(0, int), (), scale=panel_scale(picture))
    above = np.flatnonzero(detections.scores > score_floor)
    best = above[np.argsort(-detections.scores[above], kind="stable")[:MAX_DRAWN]]
    shown = detections.where(best)
    if found.masks is not None:
        encoded = [found.masks[image_id][index] for index in best]
        picture = draw_masks(picture, (coco_mask.decode(mask) > 0 for mask in encoded), shown.labels)
    captions = captions_of(shown.labels, shown.scores, class_names)
    drawn = draw_boxes(picture, shown.boxes, shown.labels, captions, scale=panel_scale(picture))
    return f"{rung}: {len(above)} above {score_floor:g}", drawn
