"""CrowdHuman's odgt files are read with their ignore regions, or refused with the line and the box."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetMapper
from PIL import Image

from tests.training.small_datasets import CROWD_BOXES, CROWD_SIZE, crowd_lines, write_crowdhuman, write_image
from training.dataset import DatasetError, check_readable, detectron2_dicts
from training.dataset_config import DatasetConfig
from training.dataset_formats import own_datasets
from training.own_dataset import OwnDataset


def read(odgt: Path, **values: Any) -> OwnDataset:
    return own_datasets(DatasetConfig(format="crowdhuman", train=str(odgt), validation=str(odgt), **values))["train"]


def test_boxes_are_clipped_and_what_is_ignored_is_a_crowd_region(tmp_path: Path) -> None:
    dataset = read(write_crowdhuman(tmp_path)).usable(tmp_path / "instances.json")
    assert (dataset.class_names, dataset.metric) == (("person",), "crowdhuman")
    assert (dataset.num_images, dataset.num_boxes, dataset.num_crowd_boxes) == (4, 5, 4)
    width, height = CROWD_SIZE
    for record, boxes in zip(detectron2_dicts(dataset), CROWD_BOXES, strict=True):
        for entry, (tag, x, y, box_width, box_height, ignore) in zip(record["annotations"], boxes, strict=True):
            left, top, right, bottom = max(x, 0), max(y, 0), min(x + box_width, width), min(y + box_height, height)
            assert entry["bbox"] == [left, top, right - left, bottom - top]
            assert entry["iscrowd"] == int(tag == "mask" or ignore == 1)


def test_training_sees_persons_only(tmp_path: Path) -> None:
    dataset = read(write_crowdhuman(tmp_path)).usable(tmp_path / "instances.json")
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    assert [len(mapper(record)["instances"]) for record in detectron2_dicts(dataset)] == [2, 1, 2, 0]


def test_sizes_are_taken_from_the_file_when_it_has_them(tmp_path: Path) -> None:
    lines = [{**each, "width": CROWD_SIZE[0], "height": CROWD_SIZE[1]} for each in crowd_lines()]
    lines[2]["height"] += 1
    own = read(write_crowdhuman(tmp_path, lines=lines))
    assert own.dataset.num_images == 4
    with pytest.raises(DatasetError, match=r"annotation_train\.odgt: image id 3: .*2,ab2\.jpg is 64 × 48 .*64 × 49"):
        check_readable(own.usable(tmp_path / "instances.json"), named=own.dataset.annotation_file)


def test_a_photo_turned_by_its_exif_entry_has_the_turned_size(tmp_path: Path) -> None:
    odgt = write_crowdhuman(tmp_path, lines=crowd_lines()[3:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", CROWD_SIZE).save(tmp_path / "Images" / "3,ab3.jpg", exif=exif)
    dataset = read(odgt).usable(tmp_path / "instances.json")
    assert check_readable(dataset) == 1
    assert (detectron2_dicts(dataset)[0]["width"], detectron2_dicts(dataset)[0]["height"]) == CROWD_SIZE[::-1]


@pytest.mark.parametrize("place", ["Images", "images", "CrowdHuman_train", "../CrowdHuman_train", "../Images", "."])
def test_the_image_folder_is_found_in_the_usual_places(tmp_path: Path, place: str) -> None:
    odgt = write_crowdhuman(tmp_path / "annotations")
    folder = odgt.parent / place
    folder.mkdir(exist_ok=True)
    for image in sorted((odgt.parent / "Images").iterdir()):
        image.rename(folder / image.name)
    assert read(odgt).dataset.image_dir == folder.resolve()


def test_the_image_folder_can_be_named(tmp_path: Path) -> None:
    odgt = write_crowdhuman(tmp_path)
    (tmp_path / "Images").rename(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match=r"'0,ab0\.jpg' is in none of .*Images, .*dataset\.train_images=FOLDER"):
        read(odgt)
    folder = str(tmp_path / "elsewhere")
    assert read(odgt, train_images=folder, validation_images=folder).dataset.num_images == 4


def box(**changes: Any) -> Callable[[list[Any]], object]:
    return lambda lines: lines[1]["gtboxes"][0].update(changes)


def line(**changes: Any) -> Callable[[list[Any]], object]:
    return lambda lines: lines[1].update(changes)


DAMAGES: dict[str, tuple[Callable[[list[Any]], object], str]] = {
    "cut off": (lambda lines: lines.insert(1, json.dumps(lines[1])[:40]), r"line 2 is not valid JSON \(.*fetch it"),
    "no object": (lambda lines: lines.insert(1, "[1]"), r"line 2 holds \[1\]; expected a JSON object"),
    "no ID": (line(ID=None), r"line 2 has the ID None"),
    "ID with a path": (line(ID="../x"), r"line 2 has the ID '\.\./x'"),
    "ID twice": (line(ID="0,ab0"), r"line 2 has the ID '0,ab0' of line 1 again"),
    "no gtboxes": (line(gtboxes=None), r"line 2 \(1,ab1\) has the gtboxes None; expected a list"),
    "box no object": (lambda lines: lines[1]["gtboxes"].insert(0, 3), r"line 2 \(1,ab1\), box 1 is 3; expected"),
    "no tag": (box(tag=None), r"line 2 \(1,ab1\), box 1 is .*expected a JSON object with tag and fbox"),
    "no fbox": (box(fbox=None), r"line 2 \(1,ab1\), box 1 \('person'\) has the fbox None"),
    "three numbers": (box(fbox=[1, 2, 3]), r"box 1 \('person'\) has the fbox \[1, 2, 3\]; expected four finite"),
    "not finite": (box(fbox=[1, 2, float("nan"), 3]), r"box 1 \('person'\) has the fbox .*finite"),
    "extra is no object": (box(extra=1), r"box 1 \('person'\) has the extra 1"),
    "ignore is text": (box(extra={"ignore": "yes"}), r"has the extra .*expected an object with ignore 0 or 1"),
    "zero width": (box(fbox=[1, 2, 0, 9]), r"box 1 \('person'\) has the fbox \[1, 2, 0, 9\].*drop_degenerate_boxes"),
    "negative": (box(fbox=[20, 2, -9, 9]), r"box 1 \('person'\) has the fbox .*no area inside its image of 64 × 48"),
    "outside": (box(fbox=[64, 2, 9, 9]), r"box 1 \('person'\) has the fbox .*no area inside its image"),
    "image missing": (line(ID="7"), r"1 of 4 image files are missing in .*Images, the first ones are 7\.jpg"),
    "size is text": (line(width="64", height=48), r"line 2 \(1,ab1\.jpg\) has the width and height \['64', 48\]"),
    "half a size": (line(height=48), r"line 2 \(1,ab1\.jpg\) has the width and height \[None, 48\]"),
    "empty": (list.clear, r"the file is empty"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_file_is_refused_by_line_and_box(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    lines: list[Any] = crowd_lines()
    change(lines)
    odgt = write_crowdhuman(tmp_path, lines=lines)
    with pytest.raises(DatasetError, match=message) as caught:
        read(odgt)
    assert str(caught.value).startswith(str(odgt))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_image_that_is_none_and_a_missing_file_are_named(tmp_path: Path) -> None:
    odgt = write_crowdhuman(tmp_path)
    (tmp_path / "Images" / "2,ab2.jpg").write_text("<html>404</html>")
    with pytest.raises(DatasetError, match=r"line 3: .*2,ab2\.jpg cannot be read .*fetch it again"):
        read(odgt)
    with pytest.raises(DatasetError, match=r"none\.odgt: there is no such annotation file.*dataset\.train"):
        read(tmp_path / "none.odgt")


def test_boxes_without_area_are_left_out_when_asked(tmp_path: Path) -> None:
    lines = crowd_lines()
    lines[0]["gtboxes"][0]["fbox"] = [-30, 0, 20, 20]
    dataset = read(write_crowdhuman(tmp_path, lines=lines), drop_degenerate_boxes=True).dataset
    assert (dataset.num_boxes, dataset.num_dropped_boxes) == (4, 1)
    assert "1 boxes of zero area left out" in dataset.changes


def test_the_digest_sees_the_file_and_the_images_sizes(tmp_path: Path) -> None:
    odgt = write_crowdhuman(tmp_path)
    before = read(odgt).digest()
    assert read(odgt).digest() == before
    write_image(tmp_path / "Images" / "1,ab1.jpg", CROWD_SIZE, 77)
    assert read(odgt).digest() != before
    write_image(tmp_path / "Images" / "1,ab1.jpg", CROWD_SIZE, 1)
    assert read(odgt).digest() == before
    odgt.write_text(odgt.read_text() + "\n")
    assert read(odgt).digest() != before
