"""CrowdHuman data sets: odgt files, one JSON object a line and image, validated and converted to COCO format.

The one class is ``person``, its box the full body ``fbox``, which is drawn beyond the image where the body is. It is
clipped to the image: detectron2 clips the boxes it trains on, the benchmark's evaluation clips truth and detections.
Boxes with another ``tag`` than ``person`` (``mask``: dolls, reflections, crowds) or with ``extra.ignore`` are ignore
regions, crowd regions in COCO's words: no positives in training, and detections in them count neither way.

An image can hold more people than the 100 detections that a detector keeps by default: raise the model's limit
(``max_detections_per_image``, or ``test_topk_per_image`` in the box head of an R-CNN).

Deviation: in training an ignore region is background, as detectron2 treats COCO's crowd regions; code written for
CrowdHuman leaves it out of the loss.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from training import coco_validation
from training.dataset import found_image_dir, raise_if_any
from training.dataset_config import DatasetConfig, DatasetError
from training.own_dataset import OwnDataset, converted

PERSON = "person"


def read_crowdhuman(config: DatasetConfig) -> dict[str, OwnDataset]:
    """The ``"train"`` and ``"validation"`` sets that the recipe names.

    Raises:
        DatasetError: anything is missing or wrong; names the line and the box.
    """
    named = {
        "train": (config.train, config.train_images),
        "validation": (config.validation, config.validation_images),
    }
    return {
        split: _read(split, Path(os.path.abspath(file or "")), images, config.drop_degenerate_boxes)
        for split, (file, images) in named.items()
    }


def _read(split: str, odgt: Path, images: str | None, drop: bool) -> OwnDataset:
    if not odgt.is_file():
        raise DatasetError(
            f"{odgt}: there is no such annotation file. Expected CrowdHuman's annotation_train.odgt or "
            f"annotation_val.odgt: check dataset.{split}."
        )
    lines, problems = _parsed_lines(odgt)
    raise_if_any(odgt, iter(problems))
    if not lines:
        raise DatasetError(f"{odgt}: the file is empty; expected one JSON object a line: fetch it again.")
    names = {number: f"{line['ID']}.jpg" for number, line in lines.items()}
    if images is None:
        part = odgt.stem.removeprefix("annotation_")
        places = ["Images", "images", f"CrowdHuman_{part}", f"../CrowdHuman_{part}", "../Images", "../images", "."]
        image_dir = found_image_dir(odgt, next(iter(names.values())), places)
    else:
        image_dir = Path(os.path.abspath(images))
    raise_if_any(odgt, coco_validation.file_problems(image_dir, list(names.values())))
    sizes = _sizes(lines, names, image_dir)
    raise_if_any(odgt, (size for size in sizes.values() if isinstance(size, str)))
    known = {number: size for number, size in sizes.items() if not isinstance(size, str)}
    document, num_dropped = _document(lines, names, known)
    if num_dropped and not drop:
        raise_if_any(odgt, _degenerate_problems(lines, known))
    return converted(
        document,
        image_dir,
        named=odgt,
        source_files=(odgt,),
        changes=("converted from CrowdHuman's odgt, boxes clipped to their images",),
        num_dropped=num_dropped,
    )


def _parsed_lines(odgt: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The lines that hold something by their number from 1, and what is wrong with them."""
    lines: dict[int, dict[str, Any]] = {}
    problems: list[str] = []
    first: dict[str, int] = {}
    for number, text in enumerate(odgt.read_bytes().split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            problems.append(f"line {number} is not valid JSON ({error}); if the file is cut off there, fetch it again.")
            continue
        found = list(_line_problems(line))
        problems += [f"line {number}{problem}" for problem in found]
        if found:
            continue
        lines[number] = line
        if first.setdefault(line["ID"], number) != number:
            problems.append(
                f"line {number} has the ID {line['ID']!r} of line {first[line['ID']]} again; expected one line an "
                f"image: join or remove one."
            )
    return lines, problems


def _line_problems(line: Any) -> Iterator[str]:
    """What is wrong with one line; each sentence goes on after ``line 3``."""
    if not isinstance(line, dict):
        yield f" holds {line!r:.40}; expected a JSON object with ID and gtboxes."
        return
    name = line.get("ID")
    if not isinstance(name, str) or not name or "/" in name:
        yield f" has the ID {name!r:.60}; expected the name of an image file without .jpg."
    boxes = line.get("gtboxes")
    if not isinstance(boxes, list):
        yield f" ({name}) has the gtboxes {boxes!r:.40}; expected a list: is this a file without annotations?"
        return
    for number, box in enumerate(boxes, start=1):
        who = f" ({name}), box {number}"
        if not isinstance(box, dict) or not isinstance(box.get("tag"), str):
            yield f"{who} is {box!r:.60}; expected a JSON object with tag and fbox."
            continue
        if not coco_validation.is_box(box.get("fbox")):
            yield (
                f"{who} ({box['tag']!r}) has the fbox {box.get('fbox')!r:.80}; expected four finite numbers "
                f"[x, y, width, height] in pixels."
            )
        extra = box.get("extra", {})
        if not isinstance(extra, dict) or extra.get("ignore", 0) not in (0, 1):
            yield f"{who} ({box['tag']!r}) has the extra {extra!r:.60}; expected an object with ignore 0 or 1."


def _sizes(
    lines: Mapping[int, Mapping[str, Any]], names: Mapping[int, str], image_dir: Path
) -> dict[int, tuple[int, int] | str]:
    """Width and height of each line's image, or what keeps them from being known.

    Some copies of the files state them; the original ones do not, and the images' headers are read.
    """

    def size(number: int) -> tuple[int, int] | str:
        stated = [lines[number].get(side) for side in ("width", "height")]
        if stated != [None, None]:
            width, height = stated
            if coco_validation.is_integer(width) and coco_validation.is_integer(height) and min(width, height) > 0:
                return width, height
            return f"line {number} ({names[number]}) has the width and height {stated}; expected two positive integers."
        try:
            with Image.open(image_dir / names[number]) as opened:
                return coco_validation.size_as_read(opened)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return (
                f"line {number}: {image_dir / names[number]} cannot be read ({error}); expected an undamaged image "
                f"file: fetch it again or remove the line."
            )

    with ThreadPoolExecutor() as pool:
        return dict(zip(lines, pool.map(size, lines), strict=True))


def _clipped(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """The part of a box inside the image, x, y, width, height; a side that is outside has length 0."""
    x, y, width, height = box
    left, right = (min(max(edge, 0.0), size[0]) for edge in (x, x + max(width, 0.0)))
    top, bottom = (min(max(edge, 0.0), size[1]) for edge in (y, y + max(height, 0.0)))
    return [left, top, right - left, bottom - top]


def _degenerate_problems(lines: Mapping[int, Mapping[str, Any]], sizes: Mapping[int, tuple[int, int]]) -> Iterator[str]:
    for number, line in lines.items():
        for position, box in enumerate(line["gtboxes"], start=1):
            if min(_clipped(box["fbox"], sizes[number])[2:]) == 0:
                width, height = sizes[number]
                yield (
                    f"line {number} ({line['ID']}), box {position} ({box['tag']!r}) has the fbox {box['fbox']}, which "
                    f"has no area inside its image of {width} × {height} pixels: correct or remove it, or set "
                    f"dataset.drop_degenerate_boxes=true to leave it out."
                )


def _document(
    lines: Mapping[int, Mapping[str, Any]], names: Mapping[int, str], sizes: Mapping[int, tuple[int, int]]
) -> tuple[dict[str, Any], int]:
    """The COCO document, and the number of boxes left out for having no area inside their image."""
    annotations: list[dict[str, Any]] = []
    num_dropped = 0
    for image_id, (number, line) in enumerate(lines.items(), start=1):
        for each in line["gtboxes"]:
            box = _clipped(each["fbox"], sizes[number])
            if min(box[2:]) == 0:
                num_dropped += 1
                continue
            is_ignored = each["tag"] != PERSON or each.get("extra", {}).get("ignore", 0) != 0
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(is_ignored),
                }
            )
    images = [
        {"id": image_id, "file_name": names[number], "width": sizes[number][0], "height": sizes[number][1]}
        for image_id, number in enumerate(lines, start=1)
    ]
    categories = [{"id": 1, "name": PERSON}]
    return {"metric": "crowdhuman", "categories": categories, "images": images, "annotations": annotations}, num_dropped
