"""Tiny data sets of other formats, written as their owners would have them on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

VOC_SIZES = ((64, 48), (48, 64), (80, 60), (60, 40), (64, 64), (96, 48))
# Class, xmin, ymin, xmax, ymax (1-based, inclusive) and whether difficult, of each image.
VOC_OBJECTS: tuple[tuple[tuple[str, int, int, int, int, int], ...], ...] = (
    (("dog", 1, 1, 30, 40, 0), ("person", 20, 5, 64, 48, 0)),
    (("dog", 5, 10, 40, 60, 1),),
    (("person", 10, 10, 50, 50, 0), ("person", 40, 1, 80, 60, 1), ("cat", 2, 30, 20, 60, 0)),
    (("cat", 1, 1, 60, 40, 0),),
    (("person", 30, 30, 30, 60, 0), ("dog", 3, 3, 60, 60, 0)),
    (),
)
# Tag, x, y, width, height of the full body (beyond the image in places) and ``extra.ignore``, of each image.
CROWD_BOXES: tuple[tuple[tuple[str, float, float, float, float, int], ...], ...] = (
    (("person", 5, 5, 20, 40, 0), ("person", 18, 4, 22, 44, 0), ("mask", 50, 2, 12, 20, 1)),
    (("person", -10, 8, 30, 70, 0), ("person", 40, 20, 20, 30, 1)),
    (("person", 4, 4, 16, 36, 0), ("person", 24, 6, 14, 34, 0), ("mask", 50, 0, 40, 30, 0)),
    (("mask", 0, 0, 30, 30, 1),),
)
CROWD_SIZE = (64, 48)


def write_image(path: Path, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def write_voc_set(
    folder: Path, name: str = "trainval", images: Sequence[int] = range(6), *, classes: Mapping[str, str] | None = None
) -> str:
    """A Pascal VOC folder with some of the six images; returns what a recipe calls the set.

    Args:
        classes: other names for the classes.
    """
    for part in ("Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index in images:
        stem = f"{index + 1:06d}"
        write_image(folder / "JPEGImages" / f"{stem}.jpg", VOC_SIZES[index], index)
        objects = "".join(_voc_object(*each, names=classes or {}) for each in VOC_OBJECTS[index])
        width, height = VOC_SIZES[index]
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        xml = f"<annotation><filename>{stem}.jpg</filename>{size}{objects}</annotation>"
        (folder / "Annotations" / f"{stem}.xml").write_text(xml)
    (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{index + 1:06d}\n" for index in images))
    return f"{folder}:{name}"


def _voc_object(name: str, xmin: int, ymin: int, xmax: int, ymax: int, difficult: int, names: Mapping[str, str]) -> str:
    # A person has parts with boxes of their own, as in VOC's person layout.
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return (
        f"<object><name>{names.get(name, name)}</name><pose>Left</pose><truncated>0</truncated>"
        f"<difficult>{difficult}</difficult><bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax>"
        f"<ymax>{ymax}</ymax></bndbox>{part if name == 'person' else ''}</object>"
    )


def crowd_lines() -> list[dict[str, Any]]:
    """The lines of an odgt file of four images, as CrowdHuman writes them: without the images' sizes."""
    return [
        {
            "ID": f"{index},ab{index}",
            "gtboxes": [
                {
                    "tag": tag,
                    "fbox": [x, y, width, height],
                    "vbox": [x, y, width, height],
                    "hbox": [x, y, 2, 2],
                    "head_attr": {"ignore": 0, "unsure": 0, "occ": 0},
                    "extra": {"ignore": 1} if ignore else {"box_id": number, "occ": 0},
                }
                for number, (tag, x, y, width, height, ignore) in enumerate(boxes)
            ],
        }
        for index, boxes in enumerate(CROWD_BOXES)
    ]


def write_crowdhuman(folder: Path, split: str = "train", lines: Sequence[Any] | None = None) -> Path:
    """``annotation_<split>.odgt`` of four images, and the images; lines that are text are written as they are."""
    for index, line in enumerate(crowd_lines()):
        write_image(folder / "Images" / f"{line['ID']}.jpg", CROWD_SIZE, index)
    odgt = folder / f"annotation_{split}.odgt"
    written = crowd_lines() if lines is None else lines
    odgt.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in written))
    return odgt
