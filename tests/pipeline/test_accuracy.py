"""The ladder: one-sided floors, the first rung that loses, and pictures of the images that changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from export.ladder import Floor, Rung
from export.parity import ParityConfig
from export.signature import Detections, DetectorSignature
from pipeline.accuracy import Ladder
from pipeline.artifact import Artifact, Manifest, plain
from pipeline.changed_images import MAX_PICTURES
from pipeline.stage import StageContext
from training.dataset import CocoDataset, read_coco

HEIGHT, WIDTH, NUM_IMAGES = 96, 128, 16
NAMES = ("eager", "canvas", "graph", "file", "served")


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    """Images the size of the canvas, with a crab and a whale each."""
    random = np.random.default_rng(0)
    for image_id in range(1, NUM_IMAGES + 1):
        pixels = random.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{image_id}.png")
    annotations = [
        {
            "id": 2 * image_id + k,
            "image_id": image_id,
            "category_id": 3 + k,
            "bbox": [x, 20, 40, 40],
            "area": 1600,
            "iscrowd": 0,
            "segmentation": [[x, 20, x + 40, 20, x + 40, 60, x, 60]],
        }
        for image_id in range(1, NUM_IMAGES + 1)
        for k, x in enumerate((10, 70))
    ]
    content = {
        "images": [
            {"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.png"} for i in range(1, NUM_IMAGES + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "crab"}, {"id": 4, "name": "whale"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return read_coco(tmp_path / "truth.json", tmp_path)


def ladder_of(dataset: CocoDataset, tmp_path: Path, *, mask_size: int | None = None, name: str = "validate") -> Ladder:
    signature = DetectorSignature(
        canvas_height=HEIGHT,
        canvas_width=WIDTH,
        short_edge_pixels=HEIGHT,
        max_edge_pixels=WIDTH,
        channel_order="RGB",
        pad_value=(124, 116, 104),
        max_batch_size=4,
        max_detections=10,
        score_threshold=0.05,
        nms_threshold=0.5,
        class_names=dataset.class_names,
        category_ids=dataset.category_ids,
        mask_size=mask_size,
    )
    (tmp_path / name).mkdir()
    (tmp_path / "model").write_bytes(b"model")
    context = cast(StageContext, SimpleNamespace(directory=tmp_path / name, command="make"))
    ladder = Ladder(dataset, signature, context, ParityConfig(num_matching_images=5))
    list(ladder.canvases())
    return ladder


def found(shift: float = 0.0, score: float = 0.9, mask_level: float | None = None) -> list[Detections]:
    """Both objects of every image, the whale moved by so many pixels."""
    boxes = np.array([[10, 20, 50, 60], [70 + shift, 20, 110 + shift, 60]], np.float32)
    masks = None if mask_level is None else np.full((2, 7, 7), mask_level, np.float32)
    one = Detections(
        boxes=boxes, scores=np.array([score, 0.8], np.float32), labels=np.array([0, 1], np.int32), masks=masks
    )
    return [one] * NUM_IMAGES


def climb(ladder: Ladder, steps: Sequence[list[Detections]], tmp_path: Path) -> dict[str, Any]:
    """Add the rungs, each made from the one before, and held to it and to the canvas; the value is their facts."""
    for index, (name, detections) in enumerate(zip(NAMES, steps, strict=False)):
        floor = Floor(points=0.05)
        held = {NAMES[index - 1]: floor, "canvas": floor} if index > 1 else {}
        before = NAMES[index - 1] if index else None
        ladder.add(Rung(name=name, compared_with=before, floors=held), detections, tmp_path / "model")
    return cast("dict[str, Any]", plain(ladder.facts()))


@pytest.mark.parametrize("broken", ["graph", "file", "served"])
def test_the_first_rung_that_loses_is_named_though_those_after_it_lose_as_much(
    dataset: CocoDataset, tmp_path: Path, broken: str
) -> None:
    ladder = ladder_of(dataset, tmp_path)
    steps = [found(shift=6.0 if index >= NAMES.index(broken) else 0.0) for index in range(len(NAMES))]
    facts = climb(ladder, steps, tmp_path)
    assert facts["first_lossy_rung"] == broken
    row = next(row for row in facts["rows"] if row["name"] == broken)
    assert row["differences"]["AP"]["value"] < -10
    assert [lost["name"] for lost in row["worst_classes"]] == ["whale"]
    first = next(gate for gate in ladder.gates if not gate.passed)
    assert first.name == f"AP of {broken} minus that of {row['compared_with']}, at least"
    assert first.limit == -0.05
    assert "largest class drops: 'whale'" in first.reason
    after = facts["rows"][NAMES.index(broken) + 1 :]
    assert all(row["differences"]["AP"]["value"] == 0 for row in after), "what is lost once is not lost again"


def test_equal_rungs_pass_and_one_that_gains_too(dataset: CocoDataset, tmp_path: Path) -> None:
    ladder = ladder_of(dataset, tmp_path)
    facts = climb(ladder, [found(6.0), found(6.0), found(6.0), found(0.0), found(0.0)], tmp_path)
    assert facts["first_lossy_rung"] is None
    assert {row["status"] for row in facts["rows"]} == {"passed"}
    gained = facts["rows"][3]
    assert gained["differences"]["AP"]["value"] > 10
    assert [gate.passed for gate in ladder.gates] == [True] * len(ladder.gates)
    assert facts["rows"][4]["agreement"]["matched_rate"] == 1.0


def test_detections_that_differ_name_their_rung_where_ap_does_not_move(dataset: CocoDataset, tmp_path: Path) -> None:
    ladder = ladder_of(dataset, tmp_path)
    climb(ladder, [found(), found(), found(score=0.95), found(score=0.95)], tmp_path)
    result = ladder.match("graph", "canvas")
    assert (result.num_images, result.num_matched, result.num_unmatched) == (5, 5, 10)
    facts = ladder.facts()
    assert facts["first_lossy_rung"] == "graph"
    assert facts["rows"][2]["differences"]["AP"]["value"] == 0
    assert ladder.match("canvas", "eager").num_unmatched == 0


def test_one_tie_is_forgiven_and_boxes_that_all_moved_are_none(dataset: CocoDataset, tmp_path: Path) -> None:
    ladder = ladder_of(dataset, tmp_path)
    one_moved = [*found(shift=1.0)[:1], *found()[1:]]
    climb(ladder, [found(), found(), one_moved, found(shift=1.0)], tmp_path)
    result = ladder.match("graph", "canvas")
    assert (result.num_matched, result.num_unmatched, result.num_tied) == (9, 0, 2)
    assert ladder.gates[-1].passed
    result = ladder.match("file", "canvas")
    assert (result.num_matched, result.num_unmatched, result.num_tied) == (5, 0, 10)
    assert not ladder.gates[-1].passed
    assert ladder.gates[-1].value == 10


def test_the_images_that_changed_are_drawn_those_of_the_lossy_step_first(dataset: CocoDataset, tmp_path: Path) -> None:
    ladder = ladder_of(dataset, tmp_path)
    facts = climb(ladder, [found(), found(shift=2.0), found(shift=2.0), found(shift=9.0)], tmp_path)
    drawn = facts["changed_images"]
    assert len(drawn) == MAX_PICTURES
    assert facts["first_lossy_rung"] == drawn[0]["rung"] == "file"
    assert {entry["rung"] for entry in drawn} == {"canvas", "file"}, "the graph changed nothing"
    assert len({entry["file"] for entry in drawn}) == MAX_PICTURES
    for entry in drawn:
        path = tmp_path / "validate" / entry["file"]
        assert path.stat().st_size < 200_000
        with Image.open(path) as picture:
            assert picture.format == "JPEG"
            assert picture.width > 2 * picture.height
    before, after = (np.asarray(half) for half in halves(tmp_path / "validate" / drawn[0]["file"]))
    assert np.abs(before.astype(int) - after).max() > 100, "the whale's box lies elsewhere on the right"


def halves(path: Path) -> tuple[Image.Image, Image.Image]:
    """The two panels of a picture, without the words above them."""
    with Image.open(path) as picture:
        width = (picture.width - 8) // 2
        panels = [picture.crop((left, 20, left + width, picture.height)) for left in (0, width + 8)]
    return panels[0], panels[1]


def test_a_rung_that_lost_its_masks_is_lossy_though_its_boxes_are_right(dataset: CocoDataset, tmp_path: Path) -> None:
    ladder = ladder_of(dataset, tmp_path, mask_size=7)
    full, half = found(mask_level=1.0), [
        dataclasses.replace(d, masks=np.where(np.arange(7) < 3, d.masks, 0).astype(np.float32))
        for d in found(mask_level=1.0)
    ]  # fmt: skip
    facts = climb(ladder, [full, full, half, half], tmp_path)
    assert facts["first_lossy_rung"] == "graph"
    (failed,) = [gate.name for gate in ladder.gates if not gate.passed and "of graph" in gate.name]
    assert failed == "mask AP of graph minus that of canvas, at least"
    row = facts["rows"][2]
    assert row["differences"]["AP"]["value"] == 0
    assert row["differences"]["segm_AP"]["value"] < -50
    assert row["differences"]["segm_AP"]["high"] < -50
    assert row["agreement"]["iou_p01"] == 1
    assert row["agreement"]["mask_iou_p50"] < 0.6
    assert [entry["rung"] for entry in facts["changed_images"]] == ["graph"] * MAX_PICTURES


def test_a_rung_of_another_stage_is_compared_with_as_if_it_were_of_this_one(
    dataset: CocoDataset, tmp_path: Path
) -> None:
    first = ladder_of(dataset, tmp_path, mask_size=7)
    climb(first, [found(mask_level=1.0)], tmp_path)
    second = ladder_of(dataset, tmp_path, mask_size=7, name="deploy")
    manifest = cast(Manifest, SimpleNamespace(files={"detections_eager.json": {}}))
    second.add_earlier("eager", Artifact(directory=tmp_path / "validate", manifest=manifest))
    rung = Rung(name="served", compared_with="eager", floors={"eager": Floor(points=0.05)})
    second.add(rung, found(mask_level=1.0), tmp_path / "model")
    (row,) = second.facts()["rows"]
    assert row["status"] == "passed"
    assert row["differences"]["AP"]["value"] == row["differences"]["segm_AP"]["value"] == 0
    assert row["agreement"]["matched_rate"] == 1
    assert row["AP"] == pytest.approx(100)
