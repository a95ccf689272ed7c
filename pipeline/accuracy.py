"""The accuracy table from eager PyTorch to the served answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from export.average_precision import average_precision, coco_results, per_class_average_precision
from export.parity import MatchResult, ParityConfig, combined, match_detections
from export.runners import Runner
from export.signature import Detections, DetectorSignature
from pipeline.artifact import digest
from pipeline.stage import Gate, StageContext
from pipeline.training_stages import STUDENT_CHECKPOINT
from serving.preprocessing import Placement, canvas_from_image, detections_in_image, read_image
from training.dataset import CocoDataset, detectron2_dicts
from training.evaluate import evaluate_detector, read_results

REFERENCE = "detectron2"
ON_CANVAS = "torch, fixed canvas"


def canvases_of(
    dataset: CocoDataset, signature: DetectorSignature, limit: int | None = None
) -> Iterator[tuple[int, np.ndarray, Placement]]:
    """Image id, canvas and placement of a data set's images, in the order of the annotation file."""
    for record in detectron2_dicts(dataset)[:limit]:
        canvas, placement = canvas_from_image(read_image(Path(record["file_name"])), signature)
        yield record["image_id"], canvas, placement


class AccuracyTable:
    """The accuracy table from eager PyTorch to the served answer, with one gate a row.

    Attributes:
        rows: one dict a row, as the report shows it.
        canvases: image id, canvas and placement of every validation image.
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
        self.canvases = list(canvases_of(dataset, signature))
        self._dataset, self._signature, self._context = dataset, signature, context
        self._reference_ap = reference_ap
        self._per_class: dict[str, dict[int, float]] = {}

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
        label_of = {category_id: label for label, category_id in enumerate(self._signature.category_ids)}
        by_image: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id, _, _ in self.canvases}
        for record in read_results(scratch):
            by_image[record["image_id"]].append(record)
        self._add_row(
            REFERENCE,
            {image_id: detections_from_coco(records, label_of) for image_id, records in by_image.items()},
            self._context.inputs["strip"].path(STUDENT_CHECKPOINT),
            None,
        )

    def add(self, name: str, runner: Runner, model: Path, compared_with: float | None, limit: float | None) -> None:
        """Run every validation image and add the row; with ``limit``, gate its AP against ``compared_with``."""
        found: dict[int, Detections] = {}
        size = self._signature.max_batch_size
        for start in range(0, len(self.canvases), size):
            part = self.canvases[start : start + size]
            for (image_id, _, placement), detections in zip(
                part, runner.run(np.stack([canvas for _, canvas, _ in part])), strict=True
            ):
                found[image_id] = detections_in_image(detections, placement)
        self.add_detections(name, found, model, compared_with, limit)

    def add_detections(
        self,
        name: str,
        found: dict[int, Detections],
        model: Path,
        compared_with: float | None,
        limit: float | None,
    ) -> None:
        """Add the row of detections in original image pixels."""
        self._add_row(name, found, model, compared_with)
        if limit is None or compared_with is None:
            return
        difference = self.rows[-1]["AP"] - compared_with
        passed = abs(difference) <= limit
        self.rows[-1]["status"] = "passed" if passed else "failed"
        self.gates.append(
            Gate(
                name=f"AP of {name} against torch on the same canvas",
                value=difference,
                limit=limit,
                passed=passed,
                reason=f"AP {self.rows[-1]['AP']:.2f} against {compared_with:.2f}; {self._worst_classes(name)}",
            )
        )

    def add_not_run(self, name: str, reason: str, model_digest: str = "") -> None:
        row = {"name": name, "status": "not run", "reason": reason, "digest": model_digest}
        self.rows.append({**row, "command": self._context.command})

    def _add_row(self, name: str, found: dict[int, Detections], model: Path, compared_with: float | None) -> None:
        ids, file = self._signature.category_ids, self._dataset.annotation_file
        scores = average_precision(file, found, ids)
        self._per_class[name] = per_class_average_precision(file, found, ids)
        (self._context.directory / detections_file(name)).write_text(json.dumps(coco_results(found, ids)))
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
                "delta_to_torch": None if compared_with is None else scores["AP"] - compared_with,
                "command": self._context.command,
            }
        )

    def matched_with_detectron2(self, student: nn.Module, runner: Runner, limits: ParityConfig) -> MatchResult:
        """Compare with detectron2's own inference on the same padded images, detection by detection."""
        results = []
        for _, canvas, _ in self.canvases[: limits.num_matching_images]:
            results.append(
                match_detections(
                    detectron2_on_canvas(student, canvas),
                    runner.run(canvas[None])[0],
                    score_threshold=self._signature.score_threshold,
                    max_detections=self._signature.max_detections,
                    min_iou=limits.min_iou,
                    max_box_error_pixels=limits.max_box_error_pixels,
                    max_score_error=limits.max_score_error,
                )
            )
        return combined(results)

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
        drops = (
            [
                (row["AP"] - row["reference_AP"], row["name"])
                for row in self.per_class(ON_CANVAS, name)
                if row["AP"] is not None and row["reference_AP"] is not None
            ]
            if ON_CANVAS in self._per_class
            else []
        )
        return "largest class changes: " + ", ".join(f"{c!r} {d:+.2f}" for d, c in sorted(drops)[:2])


def detections_file(row: str) -> str:
    """Name of the file with a row's detections, in COCO's results format."""
    return f"detections_{'_'.join(re.findall('[a-z0-9]+', row.lower()))}.json"


@torch.inference_mode()
def detectron2_on_canvas(student: nn.Module, canvas: np.ndarray) -> Detections:
    """detectron2's own inference on a (3, H, W) uint8 canvas."""
    found = student([{"image": torch.from_numpy(canvas)}])[0]["instances"].to("cpu")
    return Detections(
        boxes=found.pred_boxes.tensor.numpy(),
        scores=found.scores.numpy(),
        labels=found.pred_classes.numpy().astype(np.int32),
    )


def detections_from_coco(records: list[dict[str, Any]], label_of: dict[int, int]) -> Detections:
    """COCO results of one image (boxes XYWH) as :class:`Detections`."""
    boxes = np.array([r["bbox"] for r in records], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        boxes=boxes,
        scores=np.array([r["score"] for r in records], np.float32),
        labels=np.array([label_of[r["category_id"]] for r in records], np.int32),
    )
