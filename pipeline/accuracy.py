"""The accuracy table from eager PyTorch to the served answer."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from export.average_precision import (
    Segmentations,
    average_precision,
    coco_results,
    compressed_mask,
    per_class_average_precision,
)
from export.parity import MatchResult, ParityConfig, combined, match_detections
from export.runners import Runner
from export.signature import Detections, DetectorSignature
from pipeline.artifact import digest
from pipeline.stage import Gate, StageContext
from pipeline.training_stages import STUDENT_CHECKPOINT
from serving.mask_pasting import masks_in_image
from serving.preprocessing import Placement, canvas_from_image, detections_in_image, read_image
from training.dataset import CocoDataset, detectron2_dicts
from training.dataset_metrics import dataset_metrics
from training.evaluate import RESULTS_FILE, evaluate_detector
from training.mask_annotations import has_mask_head

REFERENCE = "detectron2"
ON_CANVAS = "torch, fixed canvas"


def canvases_of(
    dataset: CocoDataset, signature: DetectorSignature, limit: int | None = None
) -> Iterator[tuple[int, np.ndarray, Placement]]:
    """Image id, canvas and placement of a data set's images, in the order of the annotation file; read one by one."""
    for record in detectron2_dicts(dataset)[:limit]:
        canvas, placement = canvas_from_image(read_image(Path(record["file_name"])), signature)
        yield record["image_id"], canvas, placement


def detections_of(runner: Runner, canvases: Iterable[np.ndarray]) -> Iterator[Detections]:
    """The detections of each canvas, run in full batches with a ragged last one."""
    source = iter(canvases)
    while batch := list(itertools.islice(source, runner.signature.max_batch_size)):
        yield from runner.run(np.stack(batch))


class AccuracyTable:
    """The accuracy table from eager PyTorch to the served answer, with one gate a row.

    Attributes:
        rows: one dict a row, as the report shows it.
        gates: what the rows were held against.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        signature: DetectorSignature,
        context: StageContext,
        reference_ap: float | None = None,
    ) -> None:
        """``reference_ap`` is what the rows' ``delta`` refers to; None: the AP of the first row."""
        self.rows: list[dict[str, Any]] = []
        self.gates: list[Gate] = []
        self._dataset, self._signature, self._context = dataset, signature, context
        self._reference_ap = reference_ap
        self._placements: dict[int, Placement] = {}
        self._per_class: dict[str, dict[int, float]] = {}

    def canvases(self, limit: int | None = None) -> Iterator[np.ndarray]:
        """The validation images on the canvas, (3, H, W) uint8, read one by one: a large set does not fit in memory."""
        for image_id, canvas, placement in canvases_of(self._dataset, self._signature, limit):
            self._placements[image_id] = placement
            yield canvas

    def add_reference(self, student: nn.Module) -> None:
        """The plain detectron2 model, evaluated the ordinary way; the row shows what the fixed canvas costs."""
        scratch = self._context.directory / "detectron2"
        evaluate_detector(
            student,
            self._dataset,
            short_edge_pixels=self._signature.short_edge_pixels,
            max_edge_pixels=self._signature.max_edge_pixels,
            output_directory=scratch,
        )
        file = scratch / RESULTS_FILE
        by_image = detections_by_image(file, self._dataset)
        masks = segmentations_by_image(file) if has_mask_head(student) else None
        self._add_row(REFERENCE, by_image, masks, self._context.inputs["strip"].path(STUDENT_CHECKPOINT), None)

    def add(
        self,
        name: str,
        found: Iterable[Detections],
        model: Path,
        compared_with: Mapping[str, Any] | None = None,
        limit: float | None = None,
    ) -> None:
        """Add the row of what a runner found on ``canvases()``, in their order and in canvas pixels.

        With ``limit``, gate the row's AP, of boxes and of masks, against that of the row ``compared_with``.
        """
        image_ids = [record["image_id"] for record in detectron2_dicts(self._dataset)]
        in_images = {
            image_id: detections_in_image(detections, self._placements[image_id])
            for image_id, detections in zip(image_ids, found, strict=True)
        }
        self._add_row(name, in_images, self._segmentations(in_images), model, compared_with)
        if limit is None or compared_with is None:
            return
        row = self.rows[-1]
        for key, words in (("AP", "AP"), ("segm_AP", "mask AP")):
            if key not in row:
                continue
            difference = row[key] - compared_with[key]
            passed = abs(difference) <= limit
            row["status"] = "passed" if passed and row["status"] == "passed" else "failed"
            worst = self._worst_classes(name) if key == "AP" else ""
            self.gates.append(
                Gate(
                    name=f"{words} of {name} against torch on the same canvas",
                    value=difference,
                    limit=limit,
                    passed=passed,
                    reason=f"{words} {row[key]:.2f} against {compared_with[key]:.2f}{worst}",
                )
            )

    def _segmentations(self, in_images: Mapping[int, Detections]) -> Segmentations | None:
        """The masks drawn into their images; None for a detector of boxes alone."""
        if self._signature.mask_size is None:
            return None
        return {
            image_id: [compressed_mask(mask) for mask in masks_in_image(found, place.image_height, place.image_width)]
            for image_id, found in in_images.items()
            for place in [self._placements[image_id]]
        }

    def add_not_run(self, name: str, reason: str, model_digest: str = "") -> None:
        row = {"name": name, "status": "not run", "reason": reason, "digest": model_digest}
        self.rows.append({**row, "command": self._context.command})

    def _add_row(
        self,
        name: str,
        found: dict[int, Detections],
        masks: Segmentations | None,
        model: Path,
        compared_with: Mapping[str, Any] | None,
    ) -> None:
        ids, file = self._signature.category_ids, self._dataset.annotation_file
        results = coco_results(found, ids, masks)
        scores = {**average_precision(file, found, ids, masks), **dataset_metrics(self._dataset, results)}
        self._per_class[name] = per_class_average_precision(file, found, ids)
        (self._context.directory / detections_file(name)).write_text(json.dumps(results))
        if self._reference_ap is None:
            self._reference_ap = scores["AP"]
        self.rows.append(
            {
                "name": name,
                "status": "passed",
                "reason": "",
                "digest": digest(model),
                "size_bytes": model.stat().st_size,
                **scores,
                "delta": scores["AP"] - self._reference_ap,
                "delta_to_torch": None if compared_with is None else scores["AP"] - compared_with["AP"],
                "command": self._context.command,
            }
        )

    def matched_with_detectron2(self, student: nn.Module, runner: Runner, limits: ParityConfig) -> MatchResult:
        """Compare with detectron2's own inference on the same padded images, detection by detection."""
        return combined(
            match_detections(
                detectron2_on_canvas(student, canvas),
                runner.run(canvas[None])[0],
                score_threshold=self._signature.score_threshold,
                max_detections=self._signature.max_detections,
                min_iou=limits.min_iou,
                max_box_error_pixels=limits.max_box_error_pixels,
                max_score_error=limits.max_score_error,
                max_mask_error=limits.max_mask_error,
            )
            for canvas in self.canvases(limits.num_matching_images)
        )

    def per_class(self, reference: str, name: str) -> list[dict[str, Any]]:
        """AP of each class in two rows."""
        classes = zip(self._signature.category_ids, self._signature.class_names, strict=True)
        return [
            {
                "name": class_name,
                "reference_AP": self._per_class[reference].get(category_id),
                "AP": self._per_class[name].get(category_id),
            }
            for category_id, class_name in classes
        ]

    def _worst_classes(self, name: str) -> str:
        if ON_CANVAS not in self._per_class:
            return ""
        before, after = self._per_class[ON_CANVAS], self._per_class[name]
        names = dict(zip(self._signature.category_ids, self._signature.class_names, strict=True))
        drops = sorted((after[key] - before[key], names[key]) for key in names if after[key] < before[key] - 0.05)
        return "; largest class drops: " + ", ".join(f"{c!r} {d:.2f}" for d, c in drops[:2]) if drops else ""


def detections_file(row: str) -> str:
    """Name of the file with a row's detections, in COCO's results format."""
    return f"detections_{'_'.join(re.findall('[a-z0-9]+', row.lower()))}.json"


@torch.inference_mode()
def detectron2_on_canvas(student: nn.Module, canvas: np.ndarray) -> Detections:
    """detectron2's own inference on a (3, H, W) uint8 canvas."""
    inputs, masks = [{"image": torch.from_numpy(canvas)}], None
    if has_mask_head(student):
        found = student.inference(inputs, do_postprocess=False)[0].to("cpu")  # which would draw the masks
        found = found[found.pred_boxes.nonempty()]
        masks = found.pred_masks[:, 0].numpy()
    else:
        found = student(inputs)[0]["instances"].to("cpu")
    return Detections(
        boxes=found.pred_boxes.tensor.numpy(),
        scores=found.scores.numpy(),
        labels=found.pred_classes.numpy().astype(np.int32),
        masks=masks,
    )


def segmentations_by_image(results_file: Path) -> Segmentations:
    """The masks in COCO's results format, in the order of :func:`detections_by_image`."""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for record in json.loads(results_file.read_text()):
        by_image.setdefault(record["image_id"], []).append(record["segmentation"])
    return by_image


def detections_by_image(results_file: Path, dataset: CocoDataset) -> dict[int, Detections]:
    """Detections in COCO's results format (boxes XYWH) as :class:`Detections` of each image that has any."""
    label_of = {category_id: label for label, category_id in enumerate(dataset.category_ids)}
    by_image: dict[int, list[dict[str, Any]]] = {}
    for record in json.loads(results_file.read_text()):
        by_image.setdefault(record["image_id"], []).append(record)
    return {image_id: _detections(records, label_of) for image_id, records in by_image.items()}


def _detections(records: list[dict[str, Any]], label_of: dict[int, int]) -> Detections:
    boxes = np.array([r["bbox"] for r in records], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        boxes=boxes,
        scores=np.array([r["score"] for r in records], np.float32),
        labels=np.array([label_of[r["category_id"]] for r in records], np.int32),
    )
