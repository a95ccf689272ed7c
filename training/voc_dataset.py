"""Pascal VOC data sets: image sets and XML files, validated and converted to COCO format.

A set is a folder with ``Annotations/<image>.xml``, ``JPEGImages/<image>.jpg`` and lists of images in
``ImageSets/Main/<set>.txt``; several sets can be joined. As in detectron2's loader, the corners of a box are 1-based
pixels that belong to it, so (xmin, ymin, xmax, ymax) becomes the continuous box from (xmin - 1, ymin - 1) to
(xmax, ymax): with xmin = xmax it is one pixel wide. Objects marked ``difficult`` are trained on. The VOC metric neither
rewards nor punishes detecting those; COCO's metrics know no such mark and count them like the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data.datasets.pascal_voc import CLASS_NAMES

from training.dataset import raise_if_any
from training.dataset_config import DatasetConfig, DatasetError
from training.own_dataset import OwnDataset, converted
from training.voc_annotation import VocImage, read_annotation

_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
_MAX_LISTED = 12


@dataclass(frozen=True)
class ImageSet:
    """One ``FOLDER:IMAGE_SET`` of a recipe."""

    folder: Path
    name: str

    @property
    def list_file(self) -> Path:
        return self.folder / "ImageSets" / "Main" / f"{self.name}.txt"


def read_voc(config: DatasetConfig) -> dict[str, OwnDataset]:
    """The ``"train"`` and ``"validation"`` sets that the recipe names.

    Raises:
        DatasetError: anything is missing or wrong; names the XML file and the object.
    """
    texts = {"train": config.train, "validation": config.validation}
    sets = {split: image_sets(f"dataset.{split}", text or "") for split, text in texts.items()}
    images = {split: _read_images(each) for split, each in sets.items()}
    standard = config.classes is None and _class_names_in(images["train"]) <= set(CLASS_NAMES)
    classes = config.classes or (CLASS_NAMES if standard else tuple(sorted(_class_names_in(images["train"]))))
    if config.classes is None and not standard:
        changes: tuple[str, ...] = ("converted from Pascal VOC", f"{len(classes)} classes found in the training set")
    else:
        changes = ("converted from Pascal VOC",)
    return {
        split: _converted(sets[split], images[split], classes, changes, config.drop_degenerate_boxes) for split in sets
    }


def image_sets(key: str, text: str) -> list[ImageSet]:
    """The image sets that the recipe's ``key`` names, such as ``"VOC2007:trainval,VOC2012:trainval"``."""
    found = []
    for part in text.split(","):
        folder, _, name = part.strip().rpartition(":")
        if not folder or not name:
            raise DatasetError(
                f"{key}={text}: {part.strip()!r} names no image set. Expected FOLDER:IMAGE_SET such as "
                f"/data/VOCdevkit/VOC2007:trainval, several of them joined with commas."
            )
        image_set = ImageSet(Path(os.path.abspath(folder)), name)
        for needed in ("Annotations", "ImageSets/Main", "JPEGImages"):
            if not (image_set.folder / needed).is_dir():
                raise DatasetError(
                    f"{key}={text}: {image_set.folder} has no folder {needed}. Expected a Pascal VOC folder with "
                    f"Annotations, ImageSets/Main and JPEGImages, such as VOCdevkit/VOC2007: check the path."
                )
        if not image_set.list_file.is_file():
            there = sorted(path.stem for path in image_set.list_file.parent.glob("*.txt"))
            whole = [each for each in there if "_" not in each] or there
            raise DatasetError(
                f"{key}={text}: there is no {image_set.list_file}. The image sets in that folder are "
                f"{', '.join(whole[:_MAX_LISTED]) or 'none'}: name one of them after the colon."
            )
        found.append(image_set)
    return found


def _read_images(sets: Sequence[ImageSet]) -> list[VocImage]:
    """The annotated images of joined sets, in the order of the lists."""
    images: list[VocImage] = []
    for image_set in sets:
        files = {path.name: path for path in image_set.folder.joinpath("JPEGImages").resolve().iterdir()}
        names, problems = _listed(image_set)
        raise_if_any(image_set.list_file, iter(problems))
        for name in names:
            file = next((files[name + suffix] for suffix in _SUFFIXES if name + suffix in files), None)
            if file is None:
                problems.append(
                    f"image {name!r} is listed and {image_set.folder / 'JPEGImages' / name}.jpg is missing: fetch it "
                    f"again or take it out of the list."
                )
                continue
            found = read_annotation(image_set.folder / "Annotations" / f"{name}.xml", file)
            images += [found] if isinstance(found, VocImage) else []
            problems += [] if isinstance(found, VocImage) else found
        raise_if_any(image_set.list_file, iter(problems))
    return images


def _listed(image_set: ImageSet) -> tuple[list[str], list[str]]:
    """The names in a set's list, and what is wrong with it."""
    names: dict[str, int] = {}
    problems = []
    text = image_set.list_file.read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if len(words) > 1:
            problems.append(
                f"line {number} is {line.strip()!r:.60}; expected one image name. Lists such as dog_trainval.txt, with "
                f"1 or -1 after the name, are of one class: name the list of the whole set."
            )
        elif words and ("/" in words[0] or words[0].startswith(".")):
            problems.append(
                f"line {number} is {words[0]!r:.60}; expected the name of an image file without its suffix."
            )
        elif words and words[0] in names:
            problems.append(
                f"line {number} lists image {words[0]!r} again, after line {names[words[0]]}: remove one of them."
            )
        elif words:
            names[words[0]] = number
    if not names and not problems:
        problems.append("the list is empty; expected one image name a line.")
    return list(names), problems


def _class_names_in(images: Sequence[VocImage]) -> set[str]:
    return {each.name for image in images for each in image.objects}


def _converted(
    sets: Sequence[ImageSet], images: Sequence[VocImage], classes: Sequence[str], changes: tuple[str, ...], drop: bool
) -> OwnDataset:
    first_list = sets[0].list_file
    raise_if_any(first_list, _problems(images, set(classes), drop))
    image_dir = Path(os.path.commonpath([image.file.parent for image in images]))
    document = _document(images, classes, image_dir)
    document["metric"] = "voc2007" if all("2007" in each.folder.name for each in sets) else "voc"
    return converted(
        document,
        image_dir,
        named=first_list,
        source_files=(*(each.list_file for each in sets), *(image.xml for image in images)),
        changes=changes,
        num_dropped=sum(each.is_degenerate for image in images for each in image.objects),
    )


def _problems(images: Sequence[VocImage], classes: set[str], drop: bool) -> Iterator[str]:
    """Images that two sets share, classes that are not in the list, boxes of zero area."""
    first: dict[Path, VocImage] = {}
    for image in images:
        if first.setdefault(image.file, image) is not image:
            yield f"{image.file} is in two of the joined image sets: it would count twice, leave one of them out."
        for number, each in enumerate(image.objects, start=1):
            if each.name not in classes:
                yield (
                    f"{image.xml}: object {number} is a {each.name!r}; expected one of the {len(classes)} classes "
                    f"{', '.join(sorted(classes)[:_MAX_LISTED])}{', …' if len(classes) > _MAX_LISTED else ''}: correct "
                    f"the name, or name your classes with dataset.classes=[…]."
                )
            if each.is_degenerate and not drop:
                yield (
                    f"{image.xml}: object {number} ({each.name!r}) has a box of zero width or height: correct or "
                    f"remove it, or set dataset.drop_degenerate_boxes=true to leave it out."
                )


def _document(images: Sequence[VocImage], classes: Sequence[str], image_dir: Path) -> dict[str, Any]:
    """The COCO document; ``difficult`` stays in its annotations for the VOC metric."""
    ids: Mapping[str, int] = {name: number for number, name in enumerate(classes, start=1)}
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, start=1):
        for each in image.objects:
            if each.is_degenerate:
                continue
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[each.name],
                    "bbox": list(each.box),
                    "area": each.box[2] * each.box[3],
                    "iscrowd": 0,
                    "difficult": int(each.is_difficult),
                }
            )
    return {
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
        "images": [
            {
                "id": image_id,
                "file_name": image.file.relative_to(image_dir).as_posix(),
                "width": image.width,
                "height": image.height,
                "size_from": str(image.xml),
            }
            for image_id, image in enumerate(images, start=1)
        ],
        "annotations": annotations,
    }
