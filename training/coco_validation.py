"""What can be wrong in a COCO annotation file: each function yields one sentence or two for each problem it finds.

A sentence says which entry, what was found, what was expected and what to do; :mod:`training.dataset` puts the file's
name in front. Nothing here decodes pixels but :func:`pixel_problem`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from PIL import Image
from pycocotools import mask as coco_mask

_MAX_OUTSIDE_PIXELS = 1.0  # labelling tools round to whole pixels; detectron2 clips what is outside
_ENDLESS = 1e12  # JSON as Python reads it knows NaN, Infinity and integers of any length
_EXIF_ORIENTATION = 0x0112
_EXIF_TURNED = (5, 6, 7, 8)


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _ENDLESS


def encoding_problems(annotation_file: Path) -> Iterator[str]:
    """An encoding that Python's ``json.loads`` takes as bytes, but not the readers that open the file as text."""
    encoding = encoding_of(annotation_file)
    if encoding != "utf-8":
        yield f"the file is encoded as {encoding}; expected utf-8 without a byte-order mark: save it as that."


def encoding_of(annotation_file: Path) -> str:
    """``"utf-8"``, ``"utf-8-sig"`` (with a byte-order mark), or a UTF-16 or UTF-32 codec."""
    with annotation_file.open("rb") as file:
        return json.detect_encoding(file.read(4))


def structure_problems(document: Any) -> Iterator[str]:
    """The first of the three lists that is absent or does not hold objects."""
    found = sorted(document) if isinstance(document, dict) else type(document).__name__
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            yield (
                f"no list {key!r} at the top level; found {found}. Expected COCO's object detection "
                f"format with the lists images, annotations and categories."
            )
            return
        wrong = [entry for entry in document[key] if not isinstance(entry, dict)]
        if wrong or (key != "annotations" and not document[key]):
            yield (
                f"the list {key!r} {f'holds {wrong[0]!r:.40}' if wrong else 'is empty'}. Expected "
                f"one JSON object for each of the {key}."
            )
            return


def _id_problems(entries: Sequence[Mapping[str, Any]], kind: str) -> Iterator[str]:
    """Ids that are absent, no integers or used twice."""
    for position, entry in enumerate(entries):
        if not is_integer(entry.get("id")):
            yield f"{kind} number {position} has the id {entry.get('id')!r}; expected an integer, give it one."
    counts = Counter(entry["id"] for entry in entries if is_integer(entry.get("id")))
    for entry_id, count in counts.items():
        if count > 1:
            yield f"{kind} id {entry_id} is used {count} times; expected each id once, renumber them."


def category_problems(categories: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from _id_problems(categories, "category")
    for entry in categories:
        if not isinstance(entry.get("name"), str):
            yield f"category id {entry.get('id')} has the name {entry.get('name')!r}; expected a text, name it."


def image_problems(images: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Ids, sizes, and file names that are absent, absolute or point upwards."""
    yield from _id_problems(images, "image")
    for image in images:
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            yield f"image id {image.get('id')} has the file_name {name!r}; expected a path inside the image folder."
        elif PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            yield (
                f"image id {image.get('id')}: the file_name {name!r} leaves the image folder; expected a relative path "
                f"without '..', so name the folder with dataset.train_images or dataset.validation_images instead."
            )
        for side in ("width", "height"):
            if not is_integer(image.get(side)) or image[side] < 1:
                yield (
                    f"image id {image.get('id')} ({name}) has the {side} {image.get(side)!r}; expected the image "
                    f"file's {side} in pixels, a positive integer: add it."
                )


def annotation_id_problems(annotations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Ids that pycocotools cannot tell apart or, below 1, takes for no match at all."""
    yield from _id_problems(annotations, "annotation")
    for entry in annotations:
        if is_integer(entry.get("id")) and entry["id"] < 1:
            yield f"annotation id {entry['id']} counts as no object in COCO's evaluation; expected ids from 1."


def repetition_problems(annotations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The same annotation listed again: it would count as another object."""
    first: dict[int, Mapping[str, Any]] = {}
    for entry in annotations:
        if not is_integer(entry.get("id")):
            continue
        known = first.setdefault(entry["id"], entry)
        if known is not entry and known == entry:
            yield f"annotation id {entry['id']} is listed again with the same content: remove the repetition."


def annotation_problems(
    annotations: Sequence[Mapping[str, Any]], category_ids: Collection[int], image_sizes: Mapping[int, tuple[int, int]]
) -> Iterator[str]:
    """Wrong references and boxes; ``image_sizes`` maps an image id to (width, height)."""
    known = f"one of the {len(category_ids)} ids from {min(category_ids)} to {max(category_ids)} in categories"
    for position, entry in enumerate(annotations):
        who = f"annotation id {entry['id']}" if "id" in entry else f"annotation number {position}"
        category_id, image_id = entry.get("category_id"), entry.get("image_id")
        if not is_integer(category_id) or category_id not in category_ids:
            yield f"{who} has the category id {category_id!r}; expected {known}: correct or remove this annotation."
        if not is_integer(image_id) or image_id not in image_sizes:
            yield f"{who} has the image id {image_id!r}; expected an id that images lists: correct or remove it."
            continue
        if entry.get("iscrowd") not in (0, 1):
            yield f"{who} has iscrowd {entry.get('iscrowd')!r}; expected 0, or 1 for a crowd region: add it."
        if not _is_number(entry.get("area")):
            yield f"{who} has the area {entry.get('area')!r}; expected the object's area in square pixels: add it."
        yield from _box_problems(who, entry.get("bbox"), image_id, *image_sizes[image_id])


def is_box(box: Any) -> TypeGuard[list[float]]:
    """Whether this is a list of four finite numbers."""
    return isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)


def is_degenerate(box: Any) -> bool:
    """Whether this is a box of zero area; a negative side is a mistake in the file and does not count."""
    return is_box(box) and min(box[2:]) == 0


def _box_problems(who: str, box: Any, image_id: int, width: int, height: int) -> Iterator[str]:
    if not is_box(box):
        yield f"{who} has the box {box!r:.80}; expected four finite numbers [x, y, width, height] in pixels."
        return
    left, top, box_width, box_height = box
    if box_width <= 0 or box_height <= 0:
        remedy = " or set dataset.drop_degenerate_boxes=true to leave it out" if is_degenerate(box) else ""
        yield (
            f"{who} (image id {image_id}) has the box {box} of zero or negative area; expected a width and a height "
            f"above 0: correct or remove this annotation{remedy}."
        )
    elif (
        min(left, top) < -_MAX_OUTSIDE_PIXELS
        or left + box_width > width + _MAX_OUTSIDE_PIXELS
        or top + box_height > height + _MAX_OUTSIDE_PIXELS
        or min(left + box_width, top + box_height) <= 0
        or left >= width
        or top >= height
    ):
        yield (
            f"{who} has the box {box} ([x, y, width, height]) outside its image id {image_id} of {width} × {height} "
            f"pixels; expected at most {_MAX_OUTSIDE_PIXELS:g} pixel outside: clip or remove it, or correct the "
            f"image's width and height."
        )


def file_problems(image_dir: Path, file_names: Sequence[str]) -> Iterator[str]:
    """Files that are missing, or that a link takes out of the image folder. Each folder is listed once."""
    root = image_dir.resolve()
    listings: dict[Path, dict[str, bool]] = {}
    missing = []
    for name in file_names:
        path = image_dir / name
        if path.parent not in listings:
            listings[path.parent] = _files_in(path.parent)
        is_link = listings[path.parent].get(path.name)
        if is_link is None:
            missing.append(name)
        elif not (path if is_link else path.parent).resolve().is_relative_to(root):
            yield (
                f"the file_name {name!r} leaves the image folder {image_dir} through a link to {path.resolve()}; "
                f"expected the images inside the folder: copy it there or name the folder that it lies in."
            )
    if missing:
        yield (
            f"{len(missing)} of {len(file_names)} image files are missing in {image_dir}, the first ones are "
            f"{', '.join(missing[:3])}; check dataset.train_images and dataset.validation_images, "
            f"or fetch the images again."
        )


def _files_in(folder: Path) -> dict[str, bool]:
    """The files of a folder; each with whether it is a symbolic link."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}


def usable_segmentation(segmentation: Any, height: int, width: int) -> Any:
    """Polygons of three points or more, or a compressed RLE; None when there is no usable mask.

    One polygon that is not wrapped in a list of polygons is taken as it is meant.
    """
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if not isinstance(counts, list):
            return segmentation if isinstance(counts, str) else None
        usable = "size" in segmentation and all(is_integer(count) and count >= 0 for count in counts)
        return coco_mask.frPyObjects(segmentation, height, width) if usable else None
    if not isinstance(segmentation, list):
        return None
    flat = segmentation and all(_is_number(value) for value in segmentation)
    polygons = [segmentation] if flat else [polygon for polygon in segmentation if isinstance(polygon, list)]
    return [polygon for polygon in polygons if len(polygon) % 2 == 0 and len(polygon) >= 6] or None


def size_as_read(image: Image.Image) -> tuple[int, int]:
    """Width and height as detectron2 reads the image: turned by its EXIF entry. Decodes no pixels."""
    turned = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_TURNED
    return image.size[::-1] if turned else image.size


def pixel_problem(image_dir: Path, image: Mapping[str, Any]) -> str | None:
    """What is wrong with an image file's pixels or size; None when detectron2 will read it."""
    try:
        with Image.open(image_dir / image["file_name"]) as opened:
            opened.load()
            found = size_as_read(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return (
            f"image id {image['id']}: {image_dir / image['file_name']} cannot be read ({error}); expected an undamaged "
            f"image file: fetch it again or remove it from the annotation file."
        )
    expected = (image["width"], image["height"])
    if found != expected:
        return (
            f"image id {image['id']}: {image_dir / image['file_name']} is {found[0]} × {found[1]} pixels and "
            f"{image.get('size_from', 'the annotation file')} says {expected[0]} × {expected[1]}; correct width and "
            f"height there, or fetch the original image."
        )
    return None
