"""The ladder's section: what each step from eager PyTorch to the served answer loses, and the first lossy one.

A step is a rung beside the one it was made from. Everything is measured by the stages; here it is only laid out.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report.sections import AVAILABLE, NOT_RUN, Facts, Manifests, pick, section

STAGES = ("validate", "deploy")
INTERVAL_KEYS = ("value", "low", "high")
AGREEMENT_KEYS = (
    "score_floor",
    "num_detections",
    "matched_rate",
    "iou_p01",
    "iou_p50",
    "score_error_p50",
    "score_error_p99",
    "score_error_max",
    "mask_iou_p01",
    "mask_iou_p50",
)
HEAD_KEYS = ("rung", "compared_with", "tensor", "level", "max_abs_error", "mean_abs_error", "max_abs_value")
CHANGED_KEYS = ("rung", "compared_with", "image_id", "change", "file")


def ladder(
    run_dir: Path, manifests: Manifests, absent: Mapping[str, str], accuracy_rows: Sequence[Facts]
) -> dict[str, Any]:
    """Every step, the verdict on them, the images that changed most, and the head's tensors.

    Args:
        run_dir: the pictures are read from the stages' folders in it.
        accuracy_rows: the accuracy section's, for each rung's status and gates.
    """
    _, head = section("validate", manifests, absent)
    facts = {stage: (manifests.get(stage) or {}).get("facts") or {} for stage in STAGES}
    measured = {row.get("name"): row for stage in STAGES for row in facts[stage].get("rows") or []}
    rows = [_row(row, measured[row["name"]]) for row in accuracy_rows]
    if rows:
        head = {"status": AVAILABLE, "reason": None}
    return {
        **head,
        "rows": rows,
        "verdict": _verdict(rows),
        "has_masks": any(row["segm_AP"] is not None for row in rows),
        "changed_images": [
            {**pick(changed, CHANGED_KEYS), "stage": stage, "jpeg": _data_uri(run_dir / stage / str(changed["file"]))}
            for stage in STAGES
            for changed in facts[stage].get("changed_images") or []
        ],
        "head_tensors": [pick(row, HEAD_KEYS) for row in facts["validate"].get("head_tensors") or []],
    }


def _row(row: Facts, found: Facts) -> dict[str, Any]:
    differences = found.get("differences") or {}
    worst = found.get("worst_classes") or []
    return {
        **pick(row, ("name", "stage", "status", "reason", "AP", "gates")),
        "compared_with": found.get("compared_with"),
        "segm_AP": found.get("segm_AP"),
        "difference": pick(differences.get("AP"), INTERVAL_KEYS),
        "segm_difference": pick(differences.get("segm_AP"), INTERVAL_KEYS),
        "agreement": pick(found.get("agreement"), AGREEMENT_KEYS),
        "worst_classes": [{"name": lost.get("name"), **pick(lost.get("difference"), INTERVAL_KEYS)} for lost in worst],
    }


def _verdict(rows: Sequence[Facts]) -> dict[str, Any]:
    """The first rung that failed one of its gates, and one sentence about the whole ladder."""
    lossy = next((row for row in rows if row["status"] == "failed"), None)
    if lossy is not None:
        made_from = f", made from {lossy['compared_with']}" if lossy["compared_with"] else ""
        failed = [gate for gate in lossy["gates"] if gate["status"] == "failed"]
        why = (
            f": {failed[0]['name']} {_number(failed[0]['limit'])}, found {_number(failed[0]['value'])}"
            if failed
            else ""
        )
        return {"first_lossy_rung": lossy["name"], "sentence": f"First lossy step: {lossy['name']}{made_from}{why}."}
    steps = [row for row in rows if row["difference"]["value"] is not None]
    if not steps:
        return {"first_lossy_rung": None, "sentence": "No step was measured."}
    sentence = f"None of the {len(steps)} measured steps loses more than its gates allow."
    worst = min(steps, key=lambda row: row["difference"]["value"])
    lost = worst["difference"]
    if lost["value"] < 0:
        interval = f"95 % interval {_number(lost['low'])} to {_number(lost['high'])}"
        sentence += f" The largest loss of AP is {_number(lost['value'])} at {worst['name']} ({interval})."
    not_run = [row["name"] for row in rows if row["status"] == NOT_RUN]
    return {"first_lossy_rung": None, "sentence": sentence + (f" Not run: {', '.join(not_run)}." if not_run else "")}


def _number(value: object) -> str:
    return f"{value:.3f}".replace("-", "−") if isinstance(value, float) else str(value)


def _data_uri(file: Path) -> str | None:
    return "data:image/jpeg;base64," + base64.b64encode(file.read_bytes()).decode("ascii") if file.is_file() else None
