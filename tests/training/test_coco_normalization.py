"""What exporters leave out or number differently is put right in a copy; what has no one correction is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from rich.console import Console

from export.average_precision import average_precision
from export.signature import Detections
from pipeline.artifact import open_artifact
from pipeline.recipe import load
from pipeline.run import RunSummary, run_stages
from pipeline.stages import STAGES
from pipeline.training_stages import dataset_of
from training.coco_normalization import read_repairable, repaired_copy
from training.dataset import CocoDataset, DatasetError, dataset_digest, detectron2_dicts, read_coco

WIDTH, HEIGHT = 64, 48
RECIPE = Path(__file__).parents[1] / "pipeline" / "tiny_recipe.py"


def document() -> dict[str, Any]:
    """Two images with one object each, of different classes; nothing needs repair."""
    return {
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)],
        "annotations": [
            {"id": 41, "image_id": 1, "category_id": 3, "bbox": [4, 4, 16.5, 20], "iscrowd": 0, "area": 200},
            {"id": 42, "image_id": 2, "category_id": 7, "bbox": [8, 2, 30, 40], "iscrowd": 0, "area": 900},
        ],
    }


def write(folder: Path, content: dict[str, Any], encoding: str = "utf-8") -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / image["file_name"])
    file = folder / "instances.json"
    file.write_text(json.dumps(content), encoding=encoding)
    return file


def repaired(tmp_path: Path, content: dict[str, Any], encoding: str = "utf-8", **options: bool) -> CocoDataset:
    """The repaired copy; checked to be usable as it is and to have the numbers that were told before."""
    own = read_repairable(write(tmp_path, content, encoding), **options)
    copy = repaired_copy(own, tmp_path / "copy.json")
    strict = read_coco(copy.annotation_file, copy.image_dir)
    assert (strict.num_images, strict.num_boxes, strict.num_empty_images, strict.share_small) == (
        own.num_images, own.num_boxes, own.num_empty_images, own.share_small,
    )  # fmt: skip
    return copy


def annotations_of(dataset: CocoDataset) -> list[dict[str, Any]]:
    return json.loads(dataset.annotation_file.read_text())["annotations"]


def test_a_file_that_needs_nothing_has_no_changes(tmp_path: Path) -> None:
    file = write(tmp_path, document())
    assert read_repairable(file) == read_coco(file)
    assert read_repairable(file).changes == ()


@pytest.mark.parametrize("ids", [[0, 1], [-5, 3], [None, 3], ["a", "b"], [6, 6], [1.0, 2], [True, 2]])
def test_ids_that_pycocotools_would_misread_are_renumbered_in_order(tmp_path: Path, ids: list[Any]) -> None:
    content = document()
    for entry, entry_id in zip(content["annotations"], ids, strict=True):
        entry["id"] = entry_id
    copy = repaired(tmp_path, content)
    assert copy.changes == ("annotation ids renumbered from 1 to 2",)
    assert annotations_of(copy) == [{**entry, "id": n} for n, entry in enumerate(document()["annotations"], start=1)]


def test_ids_that_are_absent_are_given(tmp_path: Path) -> None:
    content = document()
    for entry in content["annotations"]:
        del entry["id"]
    assert [entry["id"] for entry in annotations_of(repaired(tmp_path, content))] == [1, 2]


def test_the_same_annotation_twice_is_refused(tmp_path: Path) -> None:
    content = document()
    content["annotations"].append(content["annotations"][1])
    with pytest.raises(DatasetError, match=r"annotation id 42 is listed again with the same content: remove"):
        read_repairable(write(tmp_path, content))


def test_missing_iscrowd_and_area_are_added(tmp_path: Path) -> None:
    content = document()
    del content["annotations"][0]["iscrowd"], content["annotations"][0]["area"]
    content["annotations"][1]["area"] = None
    copy = repaired(tmp_path, content)
    assert copy.changes == ("iscrowd 0 added to 1 annotations", "area width × height added to 2 annotations")
    assert [entry["iscrowd"] for entry in annotations_of(copy)] == [0, 0]
    assert [entry["area"] for entry in annotations_of(copy)] == [16.5 * 20, 30 * 40]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_taken_out(tmp_path: Path, encoding: str) -> None:
    copy = repaired(tmp_path, document(), encoding)
    assert len(copy.changes) == 1
    assert len(COCO(str(copy.annotation_file)).getAnnIds()) == 2


def test_boxes_of_zero_area_are_left_out_on_request_only(tmp_path: Path) -> None:
    content = document()
    content["annotations"][0]["bbox"] = [4, 4, 16, 0]
    with pytest.raises(DatasetError, match=r"id 41 .*zero .*or set dataset\.drop_degenerate_boxes=true"):
        read_repairable(write(tmp_path, content))
    copy = repaired(tmp_path, content, drop_degenerate_boxes=True)
    assert (copy.num_dropped_boxes, copy.num_boxes, copy.num_empty_images) == (1, 1, 1)
    assert annotations_of(copy) == document()["annotations"][1:]


@pytest.mark.parametrize("box", [[4, 4, -16, 0], [4, 4, 16, -2], [4, 4, 16], [60, 4, 16, 16], [4, 4, float("nan"), 0]])
def test_what_has_no_one_correction_is_refused_by_the_users_own_id(tmp_path: Path, box: list[float]) -> None:
    content = document()
    content["annotations"][0].update(id=0)
    content["annotations"][1].update(id=1, bbox=box)
    del content["annotations"][1]["area"]
    with pytest.raises(
        DatasetError, match=r"instances\.json: annotation id 1 (\(image id 2\) )?has the box [^:]*"
    ) as caught:
        read_repairable(write(tmp_path, content), drop_degenerate_boxes=True)
    assert "area None" not in str(caught.value)


def run_data_stage(tmp_path: Path, **sets: Any) -> RunSummary:
    overrides = [f"dataset.{key}={value}" for key, value in sets.items()]
    console = Console(file=io.StringIO())
    return run_stages(STAGES, load(RECIPE, overrides), tmp_path / "run", console=console, until="data")


def perfect(dataset: CocoDataset) -> dict[int, Detections]:
    """The data set's own boxes as detections."""
    found = {}
    for record in detectron2_dicts(dataset):
        boxes = np.array([entry["bbox"] for entry in record["annotations"]], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([entry["category_id"] for entry in record["annotations"]], np.int32)
        found[record["image_id"]] = Detections(boxes=boxes, scores=np.ones(len(boxes), np.float32), labels=labels)
    return found


def test_perfect_detections_on_a_set_that_counts_from_zero_have_ap_100(tmp_path: Path) -> None:
    content = document()
    for number, entry in enumerate(content["annotations"]):
        entry["id"] = number
    file = write(tmp_path / "own", content, "utf-8-sig")
    validation = write(tmp_path / "validation", content)
    assert run_data_stage(tmp_path, train=file, validation=validation).num_built == 1

    artifact = open_artifact(tmp_path / "run" / "data")
    dataset = dataset_of(artifact, "validation")
    assert dataset.annotation_file == artifact.path("instances_validation.json")
    assert dataset.image_dir == validation.parent / "images"
    assert average_precision(dataset.annotation_file, perfect(dataset), dataset.category_ids).scores[
        "AP"
    ] == pytest.approx(100)
    assert average_precision(validation, perfect(dataset), dataset.category_ids).scores["AP"] < 60, "nothing to repair"

    facts = artifact.manifest.facts
    assert facts["train"]["digest"] == dataset_digest(read_repairable(file)) == artifact.manifest.inputs["train"]
    assert facts["train"]["annotation_file"] == "instances_train.json"
    assert len(facts["train"]["changes"]) == 2
    assert run_data_stage(tmp_path, train=file, validation=validation).num_built == 0


def test_the_data_stage_reads_a_file_that_needs_nothing_where_it_is(tmp_path: Path) -> None:
    file = write(tmp_path / "own", document())
    run_data_stage(tmp_path, train=file, validation=file)
    artifact = open_artifact(tmp_path / "run" / "data")
    assert artifact.manifest.files == {}
    assert dataset_of(artifact, "train").annotation_file == file


def test_the_data_stage_counts_what_it_left_out(tmp_path: Path) -> None:
    content = document()
    content["annotations"][0]["bbox"] = [4, 4, 0, 20]
    file, validation = write(tmp_path / "own", content), write(tmp_path / "validation", document())
    with pytest.raises(DatasetError, match=r"drop_degenerate_boxes"):
        run_data_stage(tmp_path, train=file, validation=validation)
    run_data_stage(tmp_path, train=file, validation=validation, drop_degenerate_boxes="true")
    artifact = open_artifact(tmp_path / "run" / "data")
    counts = {split: artifact.manifest.facts[split]["num_dropped_boxes"] for split in ("train", "validation")}
    assert counts == {"train": 1, "validation": 0}
    assert dataset_of(artifact, "train").num_boxes == 1
