"""Validation images with ground truth and detections drawn on them, as JPEGs that fit into one HTML file."""

from __future__ import annotations

import base64
import colorsys
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from export.signature import Detections

SCORE_FLOOR = 0.3  # the score from which batch invariance is judged too: what a person would call "detected"
PANEL_EDGE_PIXELS = 480  # enlarges small images so that labels stay readable, and keeps 10 images under 2 MB
PANEL_GAP_PIXELS = 8
FONT_PIXELS = 14
MASK_OPACITY = 0.5
JPEG_QUALITY = 82

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the picture drawn on


@dataclasses.dataclass(frozen=True, kw_only=True)
class GalleryImage:
    """One validation image with what should be found on it and what each runner found.

    Attributes:
        image_id: the data set's id.
        image: path of a JPEG or PNG, or an (H, W, 3) uint8 RGB array.
        boxes: (G, 4) ground truth, xyxy in pixels of ``image``.
        labels: (G,) contiguous class indices of ``boxes``.
        detections: runner name -> its detections, boxes xyxy in pixels of ``image``.
    """

    image_id: int
    image: Path | np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    detections: Mapping[str, Detections]


def draw_gallery(images: Sequence[GalleryImage], class_names: Sequence[str]) -> list[dict[str, Any]]:
    """One entry an image: a ground-truth panel and one panel a runner, each a JPEG data URI with its description."""
    return [_draw(image, class_names) for image in images]


def _draw(item: GalleryImage, class_names: Sequence[str]) -> dict[str, Any]:
    if isinstance(item.image, np.ndarray):
        picture = Image.fromarray(item.image, mode="RGB")
    else:
        with Image.open(item.image) as opened:
            picture = opened.convert("RGB")
    panels = [_panel(picture, "ground truth", item.boxes, item.labels, None, class_names)]
    for runner, found in item.detections.items():
        shown = found.above(SCORE_FLOOR)
        panels.append(_panel(picture, runner, shown.boxes, shown.labels, shown.scores, class_names))
    return {"image_id": item.image_id, "width": picture.width, "height": picture.height, "panels": panels}


def _panel(
    picture: Image.Image,
    name: str,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    class_names: Sequence[str],
) -> dict[str, Any]:
    captions = captions_of(labels, scores, class_names)
    canvas = draw_boxes(picture, boxes, labels, captions, scale=panel_scale(picture))
    words = ", ".join(captions) if captions else "none"
    kind = "boxes" if scores is None else f"detections above score {SCORE_FLOOR}"
    return {
        "name": name,
        "num_boxes": len(captions),
        "width_pixels": canvas.width,
        "height_pixels": canvas.height,
        "description": f"{name}: {len(captions)} {kind} ({words})",
        "jpeg": _data_uri(canvas),
    }


def panel_scale(picture: Image.Image) -> float:
    """What makes a panel of a picture."""
    return PANEL_EDGE_PIXELS / max(picture.size)


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Panels from left to right, each with its words above it."""
    font = ImageFont.load_default(size=FONT_PIXELS)
    width = sum(panel.width for _, panel in panels) + PANEL_GAP_PIXELS * (len(panels) - 1)
    top = FONT_PIXELS + 6
    canvas = Image.new("RGB", (width, top + max(panel.height for _, panel in panels)), (255, 255, 255))
    draw, left = ImageDraw.Draw(canvas), 0
    for words, panel in panels:
        canvas.paste(panel, (left, top))
        draw.text((left + 2, 1), words, fill=(0, 0, 0), font=font)
        left += panel.width + PANEL_GAP_PIXELS
    return canvas


def captions_of(labels: np.ndarray, scores: np.ndarray | None, class_names: Sequence[str]) -> list[str]:
    """Class name, and score where there is one, of each box."""
    names = [class_names[label] if label < len(class_names) else f"class {label}" for label in labels]
    return names if scores is None else [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]


def draw_masks(picture: Image.Image, masks: Iterable[np.ndarray], labels: np.ndarray) -> Image.Image:
    """A copy of ``picture`` with the pixels of masks, (H, W) bool, tinted in the colours of their classes."""
    pixels = np.asarray(picture).astype(np.float32)
    for mask, label in zip(masks, labels, strict=True):
        pixels[mask] += MASK_OPACITY * (np.array(colour_of(int(label)), np.float32) - pixels[mask])
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_boxes(
    picture: Image.Image, boxes: np.ndarray, labels: np.ndarray, captions: Sequence[str], *, scale: float = 1.0
) -> Image.Image:
    """A copy of ``picture``, resized by ``scale``, with boxes (M, 4) xyxy in pixels of the original drawn on it."""
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    canvas = picture.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    # Small boxes last, so that a large neighbour does not hide them; captions over all boxes.
    order = sorted(range(len(captions)), key=lambda i: -_area(boxes[i]))
    edges = [[float(edge) * scale for edge in box] for box in boxes]
    for index in order:
        left, top, right, bottom = edges[index]
        # PIL refuses a rectangle whose right edge is left of its left edge; a box thinner than a pixel is still drawn.
        corners = (left, top, max(left, right), max(top, bottom))
        draw.rectangle(corners, outline=colour_of(int(labels[index])), width=2)
    taken: list[Rectangle] = []
    for index in order:
        taken.append(_draw_caption(draw, edges[index], captions[index], colour_of(int(labels[index])), taken))
    return canvas


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _draw_caption(
    draw: ImageDraw.ImageDraw,
    box: Sequence[float],
    caption: str,
    colour: tuple[int, int, int],
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Write ``caption`` at a corner of ``box``, at the first that hides no other caption; the value is its place."""
    font = ImageFont.load_default(size=FONT_PIXELS)
    width, height = draw.textlength(caption, font=font) + 4, FONT_PIXELS + 2
    canvas_width, canvas_height = draw.im.size
    left, top, right, bottom = box
    corners = [(x, y) for y in (top - height, bottom, top, bottom - height) for x in (left, right - width)]
    inside = [
        (min(max(0.0, x), max(0.0, canvas_width - width)), min(max(0.0, y), max(0.0, canvas_height - height)))
        for x, y in corners
    ]
    places = [(x, y, x + width, y + height) for x, y in inside]
    place = next((place for place in places if not any(_overlap(place, other) for other in taken)), places[0])
    draw.rectangle(place, fill=colour)
    draw.text((place[0] + 2, place[1] - 1), caption, fill=(0, 0, 0), font=font)
    return place


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def colour_of(label: int) -> tuple[int, int, int]:
    """A bright colour a class; neighbouring labels are far apart in hue, and black text reads on all of them."""
    red, green, blue = colorsys.hsv_to_rgb((label * 0.61803398875 + 0.13) % 1.0, 0.55, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
