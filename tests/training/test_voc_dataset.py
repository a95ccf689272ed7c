"""A Pascal VOC folder is read as detectron2 reads it, or refused with the XML file and the object."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances
from detectron2.structures import BoxMode

from tests.training.small_datasets import VOC_SIZES, write_image, write_voc_set
from training.dataset import DatasetError, check_readable, detectron2_dicts, read_coco
from training.dataset_config import DatasetConfig
from training.dataset_formats import own_datasets
from training.own_dataset import OwnDataset


def read(train: str, validation: str | None = None, **values: Any) -> dict[str, OwnDataset]:
    return own_datasets(DatasetConfig(format="voc", train=train, validation=validation or train, **values))


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    write_voc_set(tmp_path / "VOC2007")
    return tmp_path / "VOC2007"


def test_a_set_is_read_as_detectron2_reads_it(devkit: Path, tmp_path: Path) -> None:
    dataset = read(f"{devkit}:trainval")["train"].usable(tmp_path / "instances.json")
    expected = load_voc_instances(str(devkit), "trainval", CLASS_NAMES)
    found = detectron2_dicts(dataset)
    assert dataset.class_names == CLASS_NAMES
    written = read_coco(dataset.annotation_file, dataset.image_dir)
    assert dataset == dataclasses.replace(written, changes=("converted from Pascal VOC",))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["file_name"], ours["width"], ours["height"]) == (
            theirs["file_name"],
            theirs["width"],
            theirs["height"],
        )
        boxes = [BoxMode.convert(each["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for each in ours["annotations"]]
        assert boxes == [each["bbox"] for each in theirs["annotations"]]
        assert [each["category_id"] for each in ours["annotations"]] == [
            each["category_id"] for each in theirs["annotations"]
        ]
        assert not any(each["iscrowd"] for each in ours["annotations"]), "difficult objects are trained on"


def test_joined_sets_are_one_after_the_other(tmp_path: Path) -> None:
    first = write_voc_set(tmp_path / "VOC2007", images=[0, 1])
    second = write_voc_set(tmp_path / "VOC2012", images=[1, 2, 5])
    test = write_voc_set(tmp_path / "VOC2007", "test", images=[3])
    own = read(f"{first}, {second}", test)
    dataset = own["train"].usable(tmp_path / "instances.json")
    assert [Path(record["file_name"]).relative_to(tmp_path).as_posix() for record in detectron2_dicts(dataset)] == [
        *(f"VOC2007/JPEGImages/00000{i}.jpg" for i in (1, 2)),
        *(f"VOC2012/JPEGImages/00000{i}.jpg" for i in (2, 3, 6)),
    ]
    assert (dataset.num_images, dataset.num_boxes, dataset.num_empty_images) == (5, 7, 1)
    assert dataset.metric == "voc"
    assert own["validation"].dataset.metric == "voc2007"
    with pytest.raises(DatasetError, match=r"000002\.jpg is in two of the joined image sets"):
        read(f"{first},{write_voc_set(tmp_path / 'VOC2007', 'more', images=[1, 2])}")


def test_a_linked_folder_is_fine(devkit: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(devkit)
    other = write_voc_set(tmp_path / "other" / "VOC2012", images=[0])
    assert read(f"{tmp_path / 'elsewhere'}:trainval,{other}")["train"].dataset.num_images == 7


def test_classes_are_the_standard_ones_or_those_found_or_those_named(tmp_path: Path) -> None:
    custom = write_voc_set(tmp_path / "custom", classes={"dog": "wolf"})
    assert read(custom)["train"].dataset.class_names == ("cat", "person", "wolf")
    assert "3 classes found in the training set" in read(custom)["train"].dataset.changes
    named = read(custom, classes=["wolf", "cat", "person", "bear"])
    assert named["train"].dataset.class_names == ("wolf", "cat", "person", "bear")
    standard = write_voc_set(tmp_path / "standard")
    with pytest.raises(DatasetError, match=r"000001\.xml: object 1 is a 'wolf'; .* 20 classes aeroplane, .*classes="):
        read(standard, custom)
    with pytest.raises(DatasetError, match=r"object 1 is a 'dog'; expected one of the 3 classes cat, person, wolf"):
        read(custom, standard)


def test_a_box_counted_from_zero_is_kept_and_difficult_may_be_absent(devkit: Path) -> None:
    xml = devkit / "Annotations" / "000004.xml"
    text = xml.read_text().replace("<xmin>1<", "<xmin>0<").replace("<difficult>0</difficult>", "")
    xml.write_text(text.replace("<xmax>60<", "<xmax>59.5<"))
    document = read(f"{devkit}:trainval")["train"].document
    assert document is not None
    box = next(each for each in document["annotations"] if each["image_id"] == 4)
    assert box["bbox"] == [-1, 0, 60.5, 40]
    assert box["difficult"] == 0


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        xml = folder / "Annotations" / "000003.xml"
        assert old in xml.read_text()
        xml.write_text(xml.read_text().replace(old, new, 1))

    return change


def listed(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "ImageSets" / "Main" / "trainval.txt").write_text(text)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "XML missing": (lambda f: (f / "Annotations/000003.xml").unlink(), r"000003\.xml: there is no such annotation"),
    "XML cut off": (replaced("</annotation>", ""), r"000003\.xml: not readable as XML .*fetch it again"),
    "image missing": (lambda f: (f / "JPEGImages/000003.jpg").unlink(), r"image '000003' is listed and .* is missing"),
    "image listed and absent": (listed("000001\n000009\n"), r"image '000009' is listed and .*000009\.jpg is missing"),
    "no size": (replaced("<width>80</width>", ""), r"000003\.xml: size/width is None; expected"),
    "size zero": (replaced("<height>60<", "<height>0<"), r"000003\.xml: size/height is '0'; expected .* positive"),
    "no name": (replaced("<name>person</name>", ""), r"000003\.xml: object 1 \(''\) has no name"),
    "difficult 2": (replaced("<difficult>1<", "<difficult>2<"), r"object 2 \('person'\) has difficult '2'; expected 0"),
    "no number": (replaced("<xmin>10<", "<xmin>left<"), r"object 1 \('person'\) has the bndbox .*'left'.* four finite"),
    "not finite": (replaced("<xmin>10<", "<xmin>nan<"), r"object 1 \('person'\) has the bndbox .* four finite"),
    "no bndbox": (replaced("<xmax>50</xmax>", ""), r"object 1 \('person'\) has the bndbox .*'xmax': None"),
    "zero width": (replaced("<xmax>50<", "<xmax>9<"), r"object 1 \('person'\) has a box of zero .*drop_degenerate"),
    "corners swapped": (replaced("<xmax>50<", "<xmax>5<"), r"object 1 .* xmin 10, .* xmax 5, .*expected xmin ≤ xmax"),
    "outside": (replaced("<xmax>80<", "<xmax>82<"), r"object 2 .*xmax 82, .*outside its image of 80 × 60"),
    "wholly outside": (replaced("<xmin>40<", "<xmin>81<"), r"object 2 .*outside its image of 80 × 60"),
    "one class's list": (listed("000001  1\n000002 -1\n"), r"trainval\.txt: line 1 is '000001  1'.*of one class"),
    "listed twice": (listed("000001\n000001\n"), r"trainval\.txt: line 2 lists image '000001' again, after line 1"),
    "a path": (listed("../000001\n"), r"trainval\.txt: line 1 is '\.\./000001'"),
    "an empty list": (listed("\n"), r"trainval\.txt: the list is empty"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_set_is_refused_by_file_and_object(devkit: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(devkit)
    with pytest.raises(DatasetError, match=message) as caught:
        read(f"{devkit}:trainval")
    assert str(caught.value).startswith(str(devkit / "ImageSets" / "Main" / "trainval.txt"))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_boxes_of_zero_width_are_left_out_when_asked(devkit: Path, tmp_path: Path) -> None:
    replaced("<xmax>50<", "<xmax>9<")(devkit)
    dataset = read(f"{devkit}:trainval", drop_degenerate_boxes=True)["train"].usable(tmp_path / "instances.json")
    assert (dataset.num_boxes, dataset.num_dropped_boxes) == (8, 1)
    assert "1 boxes of zero area left out" in dataset.changes


def test_an_image_of_another_size_than_its_xml_says_is_named_with_it(devkit: Path, tmp_path: Path) -> None:
    own = read(f"{devkit}:trainval")["train"]
    dataset = own.usable(tmp_path / "instances.json")
    assert check_readable(dataset) == 6
    write_image(devkit / "JPEGImages" / "000002.jpg", (VOC_SIZES[1][0] + 1, VOC_SIZES[1][1]), 0)
    with pytest.raises(DatasetError, match=r"000002\.jpg is 49 × 64 pixels and .*000002\.xml says 48 × 64") as caught:
        check_readable(dataset, named=own.dataset.annotation_file)
    assert str(caught.value).startswith(str(devkit))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{devkit}", r"names no image set\. Expected FOLDER:IMAGE_SET"),
        ("{devkit}:trainval,", r"'' names no image set"),
        ("{devkit}/nowhere:trainval", r"nowhere has no folder Annotations"),
        ("{devkit}:val", r"there is no .*val\.txt\. The image sets in that folder are trainval: name one"),
    ],
)
def test_what_names_no_set_is_refused(devkit: Path, text: str, message: str) -> None:
    (devkit / "ImageSets" / "Main" / "dog_trainval.txt").write_text("")
    with pytest.raises(DatasetError, match=rf"^dataset\.train={re.escape(str(devkit))}.*{message}"):
        read(text.format(devkit=devkit))


def test_the_digest_sees_lists_xml_files_names_and_sizes_and_bytes_on_request(devkit: Path) -> None:
    def digests() -> tuple[str, str]:
        own = read(f"{devkit}:trainval")["train"]
        return own.digest(), own.digest(include_pixels=True)

    names, pixels = digests()
    assert digests() == (names, pixels)
    image = devkit / "JPEGImages" / "000002.jpg"
    data = bytearray(image.read_bytes())
    data[-10] ^= 1
    image.write_bytes(data)
    assert digests()[0] == names
    assert digests()[1] != pixels
    xml = devkit / "Annotations" / "000001.xml"
    text = xml.read_text()
    xml.write_text(text.replace("Left", "Rear"))
    assert digests()[0] != names
    xml.write_text(text)
    assert digests()[0] == names
    listed("".join(f"{i:06d}\n" for i in range(1, 6)))(devkit)
    assert digests()[0] != names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "voc"}, r"dataset\.format=voc and no data set: give dataset\.train=FOLDER:IMAGE_SET"),
        ({"format": "crowdhuman"}, r"give dataset\.train=FILE\.odgt"),
        ({"format": "voc", "train": "a:b", "validation": "a:c", "train_images": "x"}, r"dataset\.train_images .*leave"),
        ({"train": "a.odgt", "validation": "b.odgt"}, r"dataset\.format=crowdhuman"),
        ({"classes": ["dog"]}, r"dataset\.classes is set and dataset\.format is coco"),
        ({"format": "voc", "train": "a:b", "validation": "a:c", "classes": []}, r"expected one class or more"),
        ({"format": "voc", "train": "a:b", "validation": "a:c", "classes": ["x", "x"]}, r"each once"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        DatasetConfig(**values)
