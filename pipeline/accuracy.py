"""Measure the ladder: every rung on the validation images, its row, its gates, and the first that loses."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from export.average_precision import Segmentations, coco_results, compressed_mask
from export.ladder import Comparison, Floor, Measured, Rung, compared, measured
from export.parity import MatchResult, ParityConfig, combined, match_detections
from export.runners import Runner
from export.signature import Detections, DetectorSignature
from pipeline.artifact import Artifact, digest
from pipeline.changed_images import draw_changed_images
from pipeline.detection_files import detections_by_image, rung_file, segmentations_by_image
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
WORDS = {"AP": "AP", "segm_AP": "mask AP"}


def canvases_of(
    dataset: CocoDataset, signature: DetectorSignature, limit: int | None = None
) -> Iterator[tuple[int, np.ndarray, Placement]]:
    """Image id, canvas and placement of a data set's images, in the order of the annotation file; read one by one."""
    for record in detectron2_dicts(dataset)[:limit]:
        canvas, placement = canvas_from_image(read_image(Path(record["file_name"])), signature)
        yield record["image_id"], canvas, placement


def detections_of(
    runner: Runner, canvases: Iterable[np.ndarray], batch_size: int | None = None
) -> Iterator[Detections]:
    """The detections of each canvas, run in batches of this size, by default the largest, with a ragged last one."""
    source = iter(canvases)
    while batch := list(itertools.islice(source, batch_size or runner.signature.max_batch_size)):
        yield from runner.run(np.stack(batch))


class Ladder:
    """The rungs from eager PyTorch to the served answer, each held against the one it was made from.

    Attributes:
        rows: one dict a rung, as the report shows it.
        gates: what the rungs were held against, in their order.
    """

    def __init__(
        self, dataset: CocoDataset, signature: DetectorSignature, context: StageContext, limits: ParityConfig
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self.gates: list[Gate] = []
        self._dataset, self._signature, self._context, self._limits = dataset, signature, context, limits
        self._placements: dict[int, Placement] = {}
        self._measured: dict[str, Measured] = {}
        self._first_on_canvas: dict[str, list[Detections]] = {}

    def canvases(self, limit: int | None = None) -> Iterator[np.ndarray]:
        """The validation images on the canvas, (3, H, W) uint8, read one by one: a large set does not fit in memory."""
        for image_id, canvas, placement in canvases_of(self._dataset, self._signature, limit):
            self._placements[image_id] = placement
            yield canvas

    def on_another_canvas(self, signature: DetectorSignature) -> Ladder:
        """A branch of this ladder: its rungs, rows and gates are this one's, but run on another canvas."""
        branch = Ladder(self._dataset, signature, self._context, self._limits)
        branch.rows, branch.gates, branch._measured = self.rows, self.gates, self._measured
        return branch

    def remember(self, name: str, found: Iterable[Detections]) -> None:
        """What is found on the first canvases, for :meth:`match`; a rung of this name is matched by it from now on."""
        self._first_on_canvas[name] = list(found)

    def add_reference(self, student: nn.Module) -> None:
        """The first rung: the plain detectron2 model, evaluated the ordinary way."""
        scratch = self._context.directory / "detectron2"
        evaluate_detector(
            student,
            self._dataset,
            short_edge_pixels=self._signature.short_edge_pixels,
            max_edge_pixels=self._signature.max_edge_pixels,
            output_directory=scratch,
        )
        self._measure(REFERENCE, scratch / RESULTS_FILE, with_masks=has_mask_head(student))
        self._add_row(Rung(name=REFERENCE), self._context.inputs["strip"].path(STUDENT_CHECKPOINT))

    def add(self, rung: Rung, found: Iterable[Detections], model: Path, note: str = "") -> None:
        """Add a rung by what it found on :meth:`canvases`, in their order and in canvas pixels.

        Its AP, of boxes and of masks, is held against its floors; what it is compared with was added before. ``note``
        is what the row says beside its status.
        """
        records = detectron2_dicts(self._dataset)
        first = self._first_on_canvas.setdefault(rung.name, [])
        in_images, masks = {}, {}
        for record, detections in zip(records, found, strict=True):
            place = self._placements[record["image_id"]]
            in_image = detections_in_image(detections, place)
            in_images[record["image_id"]] = in_image
            if self._signature.mask_size is not None:
                pasted = masks_in_image(in_image, place.image_height, place.image_width)
                masks[record["image_id"]] = [compressed_mask(mask) for mask in pasted]
            if len(first) < self._limits.num_matching_images:
                first.append(detections)
        self._evaluate(rung.name, in_images, None if self._signature.mask_size is None else masks)
        self._add_row(rung, model, note)

    def add_earlier(self, name: str, artifact: Artifact) -> None:
        """A rung that another stage measured, for rungs of this one to be compared with; it gets no second row."""
        self._measure(name, artifact.path(rung_file("detections", name)), self._signature.mask_size is not None)

    def _measure(self, name: str, results_file: Path, with_masks: bool) -> None:
        masks = segmentations_by_image(results_file) if with_masks else None
        self._evaluate(name, detections_by_image(results_file, self._dataset), masks)

    def _evaluate(self, name: str, found: Mapping[int, Detections], masks: Segmentations | None) -> None:
        self._measured[name] = measured(self._dataset.annotation_file, found, self._signature.category_ids, masks)

    def add_not_run(self, name: str, reason: str, model_digest: str = "") -> None:
        row = {"name": name, "status": "not run", "reason": reason, "digest": model_digest}
        self.rows.append({**row, "command": self._context.command})

    def _add_row(self, rung: Rung, model: Path, note: str = "") -> None:
        found = self._measured[rung.name]
        results = coco_results(found.found, self._signature.category_ids, found.masks)
        (self._context.directory / rung_file("detections", rung.name)).write_text(json.dumps(results))
        row: dict[str, Any] = {
            "name": rung.name,
            "status": "passed",
            "reason": note,
            "digest": digest(model),
            "size_bytes": model.stat().st_size,
            **found.scores,
            **dataset_metrics(self._dataset, results),
            "compared_with": rung.compared_with,
            "gates": [],
            "command": self._context.command,
        }
        self.rows.append(row)
        if rung.compared_with is None:
            return
        before = self._measured[rung.compared_with]
        comparison = compared(found, before, score_floor=self._limits.min_matched_score)
        row |= self._facts(comparison)
        for other, floor in rung.floors.items():
            self._hold_floor(rung.name, other, floor, comparison if other == rung.compared_with else None)

    def _facts(self, comparison: Comparison) -> dict[str, Any]:
        names = dict(zip(self._signature.category_ids, self._signature.class_names, strict=True))
        worst = [{"name": names[lost.category_id], **dataclasses.asdict(lost)} for lost in comparison.worst_classes]
        return {**dataclasses.asdict(comparison), "worst_classes": worst}

    def _hold_floor(self, name: str, other: str, floor: Floor, comparison: Comparison | None) -> None:
        scores, reference = self._measured[name].scores, self._measured[other].scores
        for metric in self._measured[name].per_class:
            difference, allowed = scores[metric] - reference[metric], floor.allowed_drop(reference[metric])
            reason = f"{WORDS[metric]} {scores[metric]:.2f} against {reference[metric]:.2f}"
            if comparison is not None:
                interval = comparison.differences[metric]
                reason += f", 95 % interval of the difference {interval.low:.2f} to {interval.high:.2f}"
            if metric == "AP" and comparison is not None and comparison.worst_classes:
                drops = [f"{row['name']!r} {row['difference']['value']:.2f}" for row in self.rows[-1]["worst_classes"]]
                reason += f"; largest class drops: {', '.join(drops)}"
            self.hold(
                name,
                Gate(
                    name=f"{WORDS[metric]} of {name} minus that of {other}, at least",
                    value=difference,
                    limit=-allowed,
                    passed=difference >= -allowed,
                    reason=reason,
                ),
            )

    def hold(self, name: str, gate: Gate) -> None:
        """Count a gate as one of the rung's: where it fails, the rung does."""
        self.gates.append(gate)
        row = next(row for row in self.rows if row["name"] == name)
        row["gates"].append(gate.name)
        if not gate.passed:
            row["status"] = "failed"

    def match(self, name: str, other: str) -> MatchResult:
        """Hold the rung's first images against another's, detection by detection on the canvas: none may differ."""
        limits = self._limits
        result = combined(
            match_detections(
                reference,
                candidate,
                score_threshold=self._signature.score_threshold,
                max_detections=self._signature.max_detections,
                min_iou=limits.min_iou,
                max_box_error_pixels=limits.max_box_error_pixels,
                max_score_error=limits.max_score_error,
                max_mask_error=limits.max_mask_error,
                nms_threshold=self._signature.nms_threshold,
            )
            for reference, candidate in zip(self._first_on_canvas[other], self._first_on_canvas[name], strict=True)
        )
        few_ties = result.num_tied <= max(2, limits.max_tied_share * result.num_matched)  # of a pair both count
        self.hold(
            name,
            Gate(
                name=f"detections of {name} without a partner in those of {other}",
                value=result.num_unmatched + (0 if few_ties else result.num_tied),
                limit=0,
                passed=result.num_unmatched == 0 and few_ties,
                reason=f"{result.num_matched} matched on {result.num_images} images; {result.num_tied} are another of "
                "the same score",
            ),
        )
        return result

    def facts(self) -> dict[str, Any]:
        """The rows, the first rung that loses, and the images that changed most, which it draws into the artifact."""
        lossy = next((row["name"] for row in self.rows if row["status"] == "failed"), None)
        steps = {row["name"]: row for row in self.rows if row.get("compared_with") is not None}
        drawn = draw_changed_images(
            sorted(steps.values(), key=lambda row: row["name"] != lossy),
            self._measured,
            self._dataset,
            self._context.directory,
            score_floor=self._limits.min_matched_score,
        )
        return {"rows": self.rows, "first_lossy_rung": lossy, "changed_images": drawn}

    def per_class(self, reference: str, name: str) -> list[dict[str, Any]]:
        """AP of each class of two rungs."""
        before, after = (self._measured[rung].per_class["AP"] for rung in (reference, name))
        classes = zip(self._signature.category_ids, self._signature.class_names, strict=True)
        return [
            {"name": class_name, "reference_AP": before.get(category_id), "AP": after.get(category_id)}
            for category_id, class_name in classes
        ]


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
