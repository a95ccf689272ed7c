"""One Pascal VOC annotation file: read it, or say everything that is wrong with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

_MAX_OUTSIDE_PIXELS = 1.0  # some tools count from 0; detectron2 clips what is outside


@dataclass(frozen=True)
class VocObject:
    """One ``<object>``."""

    name: str
    box: tuple[float, float, float, float]
    """x, y, width, height in continuous pixels of the image file."""
    is_difficult: bool

    @property
    def is_degenerate(self) -> bool:
        return min(self.box[2:]) == 0


@dataclass(frozen=True)
class VocImage:
    """An image with its annotation file."""

    xml: Path
    file: Path
    width: int
    height: int
    objects: tuple[VocObject, ...]


def read_annotation(xml: Path, file: Path) -> VocImage | list[str]:
    """The annotation of the image ``file``, or one or two sentences for each problem."""
    try:
        root = ElementTree.parse(xml).getroot()
    except FileNotFoundError:
        return [f"{xml}: there is no such annotation file for an image in the list: add it, or take the image out."]
    except (ElementTree.ParseError, OSError, LookupError, ValueError) as error:
        return [f"{xml}: not readable as XML ({error}); if it was copied it may be cut off: fetch it again."]
    problems: list[str] = []
    sides = {side: _number(root.findtext(f"size/{side}")) for side in ("width", "height")}
    for side, value in sides.items():
        if value is None or value < 1 or value != int(value):
            problems.append(
                f"{xml}: size/{side} is {root.findtext(f'size/{side}')!r}; expected the image file's {side} in pixels, "
                f"a positive integer: add it."
            )
    if problems:
        return problems
    width, height = (int(value or 0) for value in sides.values())
    objects = []
    for number, element in enumerate(root.iterfind("object"), start=1):
        name = (element.findtext("name") or "").strip()
        found = _object(f"{xml}: object {number} ({name!r})", name, element, (width, height))
        if isinstance(found, VocObject):
            objects.append(found)
        else:
            problems.append(found)
    return problems or VocImage(xml, file, width, height, tuple(objects))


def _object(who: str, name: str, element: ElementTree.Element, size: tuple[int, int]) -> VocObject | str:
    """The object, or what is wrong with it."""
    if not name:
        return f"{who} has no name; expected its class: name it."
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        return f"{who} has difficult {difficult!r}; expected 0 or 1: correct it."
    texts = {key: element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")}
    corners = [_number(text) for text in texts.values()]
    xmin, ymin, xmax, ymax = (math.nan if value is None else value for value in corners)
    if any(value is None for value in corners):
        return f"{who} has the bndbox {texts}; expected four finite numbers in pixels: correct or remove it."
    box = (xmin - 1.0, ymin - 1.0, xmax - xmin + 1.0, ymax - ymin + 1.0)
    corner_text = f"xmin {xmin:g}, ymin {ymin:g}, xmax {xmax:g}, ymax {ymax:g}"
    if min(box[2:]) < 0:
        return f"{who} has the box {corner_text}; expected xmin ≤ xmax and ymin ≤ ymax: correct or remove it."
    right, bottom = (limit + _MAX_OUTSIDE_PIXELS for limit in size)
    outside = min(box[:2]) < -_MAX_OUTSIDE_PIXELS or xmax > right or ymax > bottom
    if outside or min(xmax, ymax) <= 0 or box[0] >= size[0] or box[1] >= size[1]:
        return (
            f"{who} has the box {corner_text} outside its image of {size[0]} × {size[1]} pixels, counted from 1; "
            f"expected at most {_MAX_OUTSIDE_PIXELS:g} pixel outside: correct the box, or the size in the file."
        )
    return VocObject(name, box, difficult == "1")


def _number(text: str | None) -> float | None:
    """The finite number that a text is, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
