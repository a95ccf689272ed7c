"""The embedded data set is deterministic, split cleanly, and what its annotations say is what the pixels show."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from training import embedded_dataset
from training import embedded_sources as sources
from training.dataset import check_readable, check_same_classes, read_coco
from training.embedded_dataset import CLASS_NAMES, compose_image, generate

# Of the composed pixels and annotations with the locked versions of numpy, Pillow, scikit-image and arcade.
GOLDEN_DIGEST = "01746e078b1cdc2a8ce8373a8a10848903a6357b298eb54cdedea6c4f90a54da"


@pytest.fixture(scope="module")
def annotation_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return generate(tmp_path_factory.mktemp("embedded"), num_train=240, num_validation=80)


@pytest.fixture(scope="module", params=[0, 1], ids=sources.SPLITS)
def document(request: pytest.FixtureRequest, annotation_files: tuple[Path, Path]) -> dict[str, Any]:
    return json.loads(annotation_files[request.param].read_text())


def by_image(document: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in document["images"]}
    for entry in document["annotations"]:
        objects[entry["image_id"]].append(entry)
    return objects


def pixel_digests(path: Path) -> set[str]:
    """Of a picture and of its mirror image, without the transparent border."""
    image = Image.open(path).convert("RGBA")
    image = image.crop(image.getbbox())
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return {hashlib.sha256(repr(each.size).encode() + each.tobytes()).hexdigest() for each in (image, mirrored)}


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_no_sprite_pose_or_photo_is_in_both_splits() -> None:
    train, validation = (sources.source_files(split) for split in sources.SPLITS)
    assert not set(train) & set(validation)
    assert not set().union(*map(pixel_digests, train)) & set().union(*map(pixel_digests, validation))


def test_no_class_shows_a_colour_or_outline_variant_of_one_pose_in_both_splits() -> None:
    variants = ("_outline", "Bronze", "Blue", "blue", "Green", "green", "Purple", "Pink", "Red", "Yellow", "orange")
    for entry in sources.SPRITE_CLASSES:
        poses = []
        for split in sources.SPLITS:
            names = [file.rsplit("/", 1)[1] for file in entry.files(split)]
            for variant in variants:
                names = [name.replace(variant, "") for name in names]
            poses.append(set(names))
        assert not poses[0] & poses[1], entry.name


def test_every_source_file_is_installed_and_listed_once() -> None:
    files = [file for split in sources.SPLITS for file in sources.source_files(split)]
    assert [file for file in files if not file.is_file()] == []
    assert len(files) == len(set(files))


def test_a_missing_package_is_named_with_what_to_do() -> None:
    with pytest.raises(sources.EmbeddedSourceMissing, match=r"package no_such_package.*make train-export-deploy"):
        sources._package_folder("no_such_package")
    assert sources.EmbeddedSourceMissing.exit_code == 4


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        generate(tmp_path / name, num_train=6, num_validation=3, seed=seed)
    first, again, other = (files_of(tmp_path / name) for name in "abc")
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_a_small_set_is_the_beginning_of_a_large_one(tmp_path: Path) -> None:
    generate(tmp_path / "small", num_train=3, num_validation=2)
    generate(tmp_path / "large", num_train=6, num_validation=4)
    small, large = (
        {name: data for name, data in files_of(tmp_path / size).items() if name.endswith(".jpg")}
        for size in ("small", "large")
    )
    assert len(small) == 5
    assert small.items() <= large.items()


def test_seed_0_gives_these_pixels_and_annotations_on_every_machine() -> None:
    digest = hashlib.sha256()
    for split, index in itertools.product(sources.SPLITS, range(12)):
        image, objects = compose_image(split, index, seed=0)
        digest.update(image.tobytes() + json.dumps(objects).encode())
    assert digest.hexdigest() == GOLDEN_DIGEST


def test_each_box_is_tight_around_a_mask_that_no_other_object_shares(document: dict[str, Any]) -> None:
    for objects in by_image(document).values():
        masks = [coco_mask.decode(entry["segmentation"]) for entry in objects]
        for entry, mask in zip(objects, masks, strict=True):
            rows, columns = np.nonzero(mask)
            left, top, width, height = entry["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert entry["area"] == mask.sum()
        assert not masks or np.sum(masks, axis=0).max() == 1


def test_masks_and_images_have_the_size_that_the_annotation_file_says(annotation_files: tuple[Path, Path]) -> None:
    assert [check_readable(read_coco(file)) for file in annotation_files] == [240, 80]
    for file in annotation_files:
        document = json.loads(file.read_text())
        sizes = {image["id"]: [image["height"], image["width"]] for image in document["images"]}
        assert all(entry["segmentation"]["size"] == sizes[entry["image_id"]] for entry in document["annotations"])
        assert len({tuple(size) for size in sizes.values()}) >= 5
        assert max(max(size) for size in sizes.values()) == 256


def test_the_masks_cover_the_pixels_that_pasting_changed() -> None:
    flat = np.full((224, 224, 3), (255, 0, 255), dtype=np.uint8)
    scene = embedded_dataset._Scene(canvas=Image.fromarray(flat), placed=[])
    random = np.random.RandomState(0)
    for _ in range(12):
        embedded_dataset._paste_object(scene, random, "validation")
    embedded_dataset._paste_crowd(scene, random, "validation")
    changed = (np.asarray(scene.canvas) != flat).any(axis=2)
    labelled = np.any([thing.mask for thing in scene.placed], axis=0)
    assert len(scene.placed) > 5
    # Half-transparent edge pixels change a little and belong to no mask.
    assert (changed & labelled).sum() > 0.98 * labelled.sum()
    assert (changed & labelled).sum() > 0.85 * changed.sum()


def test_the_set_is_as_crowded_small_and_varied_as_promised(annotation_files: tuple[Path, Path]) -> None:
    train, validation = (read_coco(file) for file in annotation_files)
    check_same_classes(train, validation)
    assert 12 <= len(CLASS_NAMES) <= 20
    for dataset in (train, validation):
        assert dataset.class_names == CLASS_NAMES
        assert dataset.objects_per_image >= 3.5
        assert dataset.share_small >= 0.35
        assert 0 < dataset.num_empty_images < 0.1 * dataset.num_images
        assert 0 < dataset.num_crowd_boxes < 0.1 * dataset.num_images


def test_every_class_appears_and_sizes_reach_from_tiny_to_large(document: dict[str, Any]) -> None:
    objects = [entry for entry in document["annotations"] if not entry["iscrowd"]]
    assert {entry["category_id"] for entry in objects} == set(range(1, len(CLASS_NAMES) + 1))
    roots = [(entry["bbox"][2] * entry["bbox"][3]) ** 0.5 for entry in objects]
    assert min(roots) < 12
    assert max(roots) > 100


def test_many_boxes_overlap_another(document: dict[str, Any]) -> None:
    num_overlapping = num_boxes = 0
    for objects in by_image(document).values():
        boxes = np.array([entry["bbox"] for entry in objects if not entry["iscrowd"]], dtype=float).reshape(-1, 4)
        if len(boxes):
            overlaps = coco_mask.iou(boxes, boxes, np.zeros(len(boxes), dtype=np.uint8)) - np.eye(len(boxes))
            num_overlapping += int((overlaps.max(axis=1) > 0.05).sum())
            num_boxes += len(boxes)
    assert num_overlapping > 0.2 * num_boxes


def test_progress_counts_the_images_of_both_splits(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    generate(tmp_path, num_train=2, num_validation=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
