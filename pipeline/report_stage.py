"""The stage that writes the report from whatever the others left."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from export.signature import Detections
from pipeline import environment
from pipeline.baseline import baseline_command, find_baseline
from pipeline.detection_files import detections_by_image, rung_file
from pipeline.report import GalleryImage, build_report, write_report
from pipeline.stage import StageContext, StageResult
from pipeline.status import read_failure
from pipeline.training_stages import dataset_of
from training.dataset import detectron2_dicts

NUM_GALLERY_IMAGES = 10
MAX_GALLERY_OBJECTS = 8  # more captions than that cover each other
SIZE_EDGES = (32**2, 96**2)  # COCO's small, medium and large, in square pixels of the file


def report(context: StageContext) -> StageResult:
    """Write report.json, report.md and report.html."""
    manifests = {name: dataclasses.asdict(artifact.manifest) for name, artifact in context.inputs.items()}
    failure = read_failure(context.run_dir)
    train = context.inputs.get("train")
    content = build_report(
        context.run_dir,
        manifests=manifests,
        failure=failure if failure and failure["stage"] != "report" else None,
        recipe_name=context.recipe.name,
        environment=environment.facts(),
        gallery=_gallery(context),
        baseline=find_baseline(context.run_dir, train.manifest) if train else None,
        baseline_command=baseline_command(context.recipe, context.run_dir),
    )
    write_report(content, context.directory)
    return StageResult()


def _gallery(context: StageContext) -> list[GalleryImage]:
    """Validation images, with the detections of the first and of the last row that has any."""
    if "data" not in context.inputs or "validate" not in context.inputs:
        return []
    rows = [
        (artifact, row["name"])
        for name in ("validate", "deploy")
        if (artifact := context.inputs.get(name)) is not None
        for row in artifact.manifest.facts.get("rows", [])
        if row["status"] != "not run"
    ]
    dataset = dataset_of(context.inputs["data"], "validation")
    found = {
        name: detections_by_image(artifact.path(rung_file("detections", name)), dataset)
        for artifact, name in (rows[0], rows[-1])
    }
    return [_gallery_image(record, found) for record in _shown(detectron2_dicts(dataset))]


def _shown(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images worth looking at, spread over the set: a few objects of as many sizes as can be, whatever was found."""

    def num_sizes(record: dict[str, Any]) -> int:
        areas = [a["bbox"][2] * a["bbox"][3] for a in record["annotations"] if not a["iscrowd"]]
        readable = 1 < len(areas) <= MAX_GALLERY_OBJECTS
        return len(set(np.digitize(areas, SIZE_EDGES))) if readable else min(len(areas), 1)

    # Stretches of the set, and the best image of each; a stretch of empty images gives none.
    stretches = np.array_split(np.arange(len(records)), min(NUM_GALLERY_IMAGES, len(records)))
    best = [max((records[i] for i in stretch), key=num_sizes) for stretch in stretches]
    return [record for record in best if record["annotations"]]


def _gallery_image(record: dict[str, Any], found: dict[str, dict[int, Detections]]) -> GalleryImage:
    objects = [a for a in record["annotations"] if not a["iscrowd"]]
    boxes = np.array([a["bbox"] for a in objects], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    nothing = Detections(boxes=np.zeros((0, 4), np.float32), scores=np.zeros(0), labels=np.zeros(0, np.int32))
    return GalleryImage(
        image_id=record["image_id"],
        image=Path(record["file_name"]),
        boxes=boxes,
        labels=np.array([a["category_id"] for a in objects], np.int32),
        detections={name: by_image.get(record["image_id"], nothing) for name, by_image in found.items()},
    )
