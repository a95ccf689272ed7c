"""A COCO data set is read as it is, or refused with a message that says what, where and what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from training.dataset import (
    CheckedMapper,
    CocoDataset,
    DatasetConfig,
    DatasetError,
    UnusableImageError,
    check_readable,
    check_same_classes,
    dataset_digest,
    detectron2_dicts,
    read_coco,
    register_with_detectron2,
)

WIDTH, HEIGHT = 64, 48


def document() -> dict[str, Any]:
    """Three images (the last one empty), two categories with a gap and out of order, polygon, RLE and crowd."""
    crowd_mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    crowd_mask[10:20, 5:50] = 1
    rle = coco_mask.encode(crowd_mask)
    uncompressed = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    compressed = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
    polygon = [[4.0, 4.0, 20.0, 4.0, 20.0, 20.0, 4.0, 20.0]]
    boxes = [
        (1, 7, [4.0, 4.0, 16.0, 16.0], 0, polygon),
        (1, 3, [0, 0, WIDTH, HEIGHT], 0, uncompressed),
        (1, 7, [5, 10, 45, 10], 1, compressed),
        (2, 3, [-0.6, 30.5, 20.0, 18.0], 0, []),
    ]
    return {
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in (1, 2, 5)
        ],
        "annotations": [
            {
                "id": 10 + i, "image_id": image_id, "category_id": category_id, "bbox": box, "iscrowd": iscrowd,
                "area": box[2] * box[3], "segmentation": segmentation,
            }
            for i, (image_id, category_id, box, iscrowd, segmentation) in enumerate(boxes)
        ],
    }  # fmt: skip


def write(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        noise = np.random.default_rng(image["id"]).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{image['id']}.jpg")
    file = folder / "instances_train.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def annotation_file(tmp_path: Path) -> Path:
    return write(tmp_path, document())


def test_the_numbers_of_a_data_set_are_counted(annotation_file: Path) -> None:
    assert read_coco(annotation_file) == CocoDataset(
        annotation_file=annotation_file,
        image_dir=annotation_file.parent / "images",
        class_names=("cat", "dog"),
        category_ids=(3, 7),
        num_images=3,
        num_boxes=3,
        num_empty_images=1,
        num_crowd_boxes=1,
        objects_per_image=1.5,
        share_small=2 / 3,
    )


def test_detectron2_gets_what_its_own_loader_makes_of_the_file(annotation_file: Path) -> None:
    dataset = read_coco(annotation_file)
    expected = load_coco_json(str(annotation_file), str(dataset.image_dir), "expected-by-the-loader")
    found = detectron2_dicts(dataset)
    for entry in (entry for record in expected for entry in record["annotations"]):
        if entry.get("segmentation") == []:
            del entry["segmentation"]
    assert found == expected


def test_registering_a_name_again_replaces_the_data_set(annotation_file: Path, tmp_path: Path) -> None:
    content = document()
    content["categories"][0]["name"] = "wolf"
    del content["images"][2]
    other = read_coco(write(tmp_path / "other", content))
    for dataset in (read_coco(annotation_file), other):
        register_with_detectron2("registered-again", dataset)
    assert len(DatasetCatalog.get("registered-again")) == 2
    metadata = MetadataCatalog.get("registered-again")
    assert metadata.thing_classes == ["cat", "wolf"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert metadata.json_file == str(other.annotation_file)
    assert metadata.image_root == str(other.image_dir)
    assert len(COCO(metadata.json_file).getImgIds()) == 2


def test_the_stock_mapper_reads_the_records(annotation_file: Path) -> None:
    mapper = DatasetMapper(is_train=True, augmentations=[T.ResizeShortestEdge(48, 64)], image_format="RGB")
    instances = [mapper(record)["instances"] for record in detectron2_dicts(read_coco(annotation_file))]
    assert [len(each) for each in instances] == [2, 1, 0]
    assert instances[1].gt_boxes.tensor.min() == 0  # clipped
    assert instances[0].gt_classes.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("segmentation", "usable"),
    [
        ([4, 4, 20, 4, 20, 20], [[4, 4, 20, 4, 20, 20]]),
        ([[4, 4, 20, 4, 20, 20], [1, 1, 2, 2], 7, None], [[4, 4, 20, 4, 20, 20]]),
        ([4, 4, 20, 4], None),
        ({"size": [HEIGHT, WIDTH], "counts": [0, "many"]}, None),
        ({"counts": [0, HEIGHT * WIDTH]}, None),
        ({"size": [HEIGHT, WIDTH]}, None),
        ("none", None),
        (5, None),
    ],
)
def test_a_mask_in_another_form_is_understood_or_left_out(tmp_path: Path, segmentation: Any, usable: Any) -> None:
    content = document()
    content["annotations"][0]["segmentation"] = segmentation
    instance = detectron2_dicts(read_coco(write(tmp_path, content)))[0]["annotations"][0]
    assert instance.get("segmentation") == usable


@pytest.mark.parametrize("place", ["images", "../train", "../images", "."])
def test_the_image_folder_is_found_in_the_usual_places(annotation_file: Path, place: str) -> None:
    folder = annotation_file.parent / "annotations"
    folder.mkdir()
    moved = annotation_file.rename(folder / annotation_file.name)
    expected = Path(os.path.normpath(folder / place))
    if place == ".":
        for image in (annotation_file.parent / "images").iterdir():
            image.rename(folder / image.name)
    else:
        (annotation_file.parent / "images").rename(expected)
    assert read_coco(moved).image_dir == expected


def test_folders_without_the_images_are_listed_in_the_message(annotation_file: Path) -> None:
    (annotation_file.parent / "images").rename(annotation_file.parent / "elsewhere")
    with pytest.raises(DatasetError, match=r"'1\.jpg' is in none of .*images, .*dataset\.train_images=FOLDER"):
        read_coco(annotation_file)
    assert read_coco(annotation_file, annotation_file.parent / "elsewhere").num_images == 3


def annotation(index: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["annotations"][index].update(changes)


def image(index: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["images"][index].update(changes)


def without(key: str, field: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[key][0].pop(field)


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no annotations list": (lambda content: content.pop("annotations"), r"no list 'annotations'.*found \['categories"),
    "images is no list": (lambda content: content.update(images={}), r"no list 'images'"),
    "an image is no object": (lambda content: content["images"].append(3), r"'images' holds 3"),
    "no categories": (lambda content: content["categories"].clear(), r"'categories' is empty"),
    "no images": (lambda content: content["images"].clear(), r"'images' is empty"),
    "category twice": (lambda content: content["categories"][0].update(id=3), r"category id 3 is used 2 times"),
    "category unnamed": (without("categories", "name"), r"category id 7 has the name None"),
    "category out of range": (annotation(1, category_id=8), r"annotation id 11 has the category id 8; .* 3 to 7"),
    "category is a list": (annotation(1, category_id=[3]), r"annotation id 11 has the category id \[3\]"),
    "category absent": (without("annotations", "category_id"), r"annotation id 10 has the category id None"),
    "annotation twice": (annotation(1, id=10), r"annotation id 10 is used 2 times"),
    "annotation id zero": (annotation(1, id=0), r"annotation id 0 counts as no object .*ids from 1"),
    "annotation without id": (without("annotations", "id"), r"annotation number 0 has the id None"),
    "unknown image": (annotation(3, image_id=99), r"annotation id 13 has the image id 99"),
    "image twice": (image(1, id=1), r"image id 1 is used 2 times"),
    "box of three numbers": (annotation(0, bbox=[1, 2, 3]), r"annotation id 10 has the box \[1, 2, 3\]; expected four"),
    "box with text": (annotation(0, bbox=[1, 2, 3, "4"]), r"annotation id 10 has the box"),
    "box not finite": (annotation(0, bbox=[1, 2, float("nan"), 4]), r"annotation id 10 .*finite"),
    "box infinite": (annotation(0, bbox=[1, 2, float("inf"), 4]), r"annotation id 10 .*finite"),
    "box absent": (without("annotations", "bbox"), r"annotation id 10 has the box None"),
    "box of zero width": (annotation(2, bbox=[1, 2, 0, 4]), r"id 12 .*remove .*dataset\.drop_degenerate_boxes=true"),
    "box of negative height": (annotation(2, bbox=[1, 2, 3, -4]), r"id 12 \(image id 1\).*negative.*annotation\.$"),
    "box outside right": (annotation(0, bbox=[60, 0, 5.1, 5]), r"id 10 .* outside its image id 1 of 64 × 48"),
    "box outside left": (annotation(0, bbox=[-1.1, 0, 5, 5]), r"id 10 .* outside its image id 1"),
    "box outside below": (annotation(0, bbox=[0, 40, 5, 9.1]), r"id 10 .* outside its image id 1"),
    "box wholly outside": (annotation(0, bbox=[64, 0, 0.5, 5]), r"id 10 .* outside its image id 1"),
    "no iscrowd": (without("annotations", "iscrowd"), r"annotation id 10 has iscrowd None"),
    "no area": (without("annotations", "area"), r"annotation id 10 has the area None"),
    "no width": (without("images", "width"), r"image id 1 \(1\.jpg\) has the width None"),
    "height zero": (image(0, height=0), r"image id 1 \(1\.jpg\) has the height 0"),
    "no file name": (without("images", "file_name"), r"image id 1 has the file_name None"),
    "absolute file name": (image(0, file_name="/etc/hostname"), r"image id 1: .*'/etc/hostname' leaves the image"),
    "file name upwards": (image(0, file_name="a/../../x.jpg"), r"image id 1: .*leaves the image folder"),
    "file missing": (image(1, file_name="2a.jpg"), r"1 of 3 image files are missing in .*images.*2a\.jpg"),
    "folder missing": (image(1, file_name="sub/2.jpg"), r"1 of 3 image files are missing"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_annotation_file_is_refused_by_name_and_entry(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    file = write(tmp_path, document())
    content = document()
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=message) as caught:
        read_coco(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_first_problems_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    content = document()
    for entry in content["annotations"]:
        entry["bbox"][2] = 0
    with pytest.raises(DatasetError, match=r"id 10 .*id 11 .*id 12 .*And 1 more like this\.$"):
        read_coco(write(tmp_path, content))


def test_a_missing_a_truncated_and_a_foreign_annotation_file_are_refused(annotation_file: Path) -> None:
    text = annotation_file.read_text()
    with pytest.raises(DatasetError, match=r"no\.json: there is no such annotation file"):
        read_coco(annotation_file.with_name("no.json"))
    for damaged in (text[: len(text) // 2], "", "\xff"):
        annotation_file.write_text(damaged, encoding="latin-1")
        with pytest.raises(DatasetError, match=r"instances_train\.json: not valid JSON .*fetch it again"):
            read_coco(annotation_file)
    annotation_file.write_text(text, encoding="utf-8-sig")
    with pytest.raises(DatasetError, match=r"encoded as utf-8-sig; expected utf-8"):
        read_coco(annotation_file)
    annotation_file.write_text("[1, 2]")
    with pytest.raises(DatasetError, match="no list 'images' at the top level; found list"):
        read_coco(annotation_file)


def test_a_link_out_of_the_image_folder_is_refused_and_one_inside_is_not(annotation_file: Path, tmp_path: Path) -> None:
    images = annotation_file.parent / "images"
    (images / "1.jpg").rename(images / "one.jpg")
    (images / "1.jpg").symlink_to("one.jpg")
    assert read_coco(annotation_file).num_images == 3
    (images / "1.jpg").unlink()
    (images / "one.jpg").rename(tmp_path / "outside.jpg")
    (images / "1.jpg").symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(DatasetError, match=r"'1\.jpg' leaves the image folder .*outside\.jpg"):
        read_coco(annotation_file)


def test_a_linked_subfolder_out_of_the_image_folder_is_refused(tmp_path: Path) -> None:
    content = document()
    content["images"][1]["file_name"] = "sub/2.jpg"
    file = write(tmp_path, content)
    (tmp_path / "other").mkdir()
    (tmp_path / "images" / "2.jpg").rename(tmp_path / "other" / "2.jpg")
    (tmp_path / "images" / "sub").symlink_to(tmp_path / "other")
    with pytest.raises(DatasetError, match=r"'sub/2\.jpg' leaves the image folder"):
        read_coco(file)


def test_a_linked_image_folder_is_fine(annotation_file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "images")
    assert read_coco(annotation_file, tmp_path / "link").num_images == 3


def damage_by_truncation(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damage_by_text(path: Path) -> None:
    path.write_text("<html>404</html>")


def damage_by_size(path: Path) -> None:
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(path)


def damage_by_bomb(path: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(path, format="PNG")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_by_truncation, r"image id 2: .*2\.jpg cannot be read \(.*truncated.*fetch it again"),
        (damage_by_text, r"image id 2: .*2\.jpg cannot be read \(cannot identify"),
        (damage_by_size, r"image id 2: .*2\.jpg is 65 × 48 pixels and the annotation file says 64 × 48"),
        (damage_by_bomb, r"image id 2: .*2\.jpg cannot be read \(Image size \(100000000 pixels\) exceeds"),
    ],
)
def test_damaged_pixels_are_found_and_named(
    annotation_file: Path, damage: Callable[[Path], None], message: str
) -> None:
    dataset = read_coco(annotation_file)
    assert check_readable(dataset) == 3
    damage(dataset.image_dir / "2.jpg")
    read_coco(annotation_file)
    with pytest.raises(DatasetError, match=message):
        check_readable(dataset)
    assert check_readable(dataset, max_images=1) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"^image id 2: .*2\.jpg cannot be read \(.*No such file.*fetch it again"),
        (damage_by_truncation, r"^image id 2: .*2\.jpg cannot be read \(.*truncated.*fetch it again"),
        (damage_by_size, r"^image id 2: .*2\.jpg is 65 × 48 pixels and the annotation file says 64 × 48"),
    ],
)
def test_pixels_damaged_after_the_check_are_named_by_the_loader(
    annotation_file: Path, damage: Callable[[Path], None], message: str, num_workers: int
) -> None:
    dataset = read_coco(annotation_file)
    damage(dataset.image_dir / "2.jpg")
    mapper = CheckedMapper(is_train=True, augmentations=[], image_format="RGB")
    loader = build_detection_test_loader(detectron2_dicts(dataset), mapper=mapper, num_workers=num_workers)
    with pytest.raises(UnusableImageError, match=message) as caught:
        list(loader)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DatasetError)


def test_an_error_that_is_not_the_images_stays_what_it_is(annotation_file: Path) -> None:
    record = detectron2_dicts(read_coco(annotation_file))[0]
    record["annotations"][0]["bbox"] = ["four", "words", "no", "numbers"]
    with pytest.raises(ValueError, match="str") as caught:
        CheckedMapper(is_train=True, augmentations=[], image_format="RGB")(record)
    assert not isinstance(caught.value, DatasetError)


def test_a_photo_turned_by_its_exif_entry_has_the_turned_size(tmp_path: Path) -> None:
    content = document()
    content["images"][1].update(width=HEIGHT, height=WIDTH)
    content["annotations"].pop()
    dataset = read_coco(write(tmp_path, content))
    with pytest.raises(DatasetError, match="is 64 × 48 pixels"):
        check_readable(dataset)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(dataset.image_dir / "2.jpg", exif=exif)
    assert check_readable(dataset) == 3
    DatasetMapper(is_train=True, augmentations=[], image_format="RGB")(detectron2_dicts(dataset)[1])


def test_the_digest_sees_annotations_names_and_sizes_and_bytes_on_request(annotation_file: Path) -> None:
    dataset = read_coco(annotation_file)
    path = dataset.image_dir / "2.jpg"
    names, pixels = dataset_digest(dataset), dataset_digest(dataset, include_pixels=True)
    assert (names, pixels) == (dataset_digest(dataset), dataset_digest(dataset, include_pixels=True))

    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    assert dataset_digest(dataset) == names
    assert dataset_digest(dataset, include_pixels=True) != pixels

    path.write_bytes(data + b"\0")
    assert dataset_digest(dataset) != names

    path.write_bytes(data)
    annotation_file.write_text(annotation_file.read_text() + " ")
    assert dataset_digest(dataset) != names


def test_two_splits_with_other_categories_are_refused(annotation_file: Path, tmp_path: Path) -> None:
    content = document()
    content["categories"].reverse()
    train, reordered = read_coco(annotation_file), read_coco(write(tmp_path / "reordered", content))
    check_same_classes(train, reordered)
    content["categories"][0]["name"] = "lynx"
    with pytest.raises(DatasetError, match=r"other categories than .*\(3, 'cat'\), \(3, 'lynx'\)"):
        check_same_classes(train, read_coco(write(tmp_path / "renamed", content)))


@pytest.mark.parametrize("values", [{"train": "a.json"}, {"num_train": 0}])
def test_half_a_data_set_or_none_is_no_recipe(values: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match=r"dataset\."):
        DatasetConfig(**values)
