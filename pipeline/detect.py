"""Send images to a served detector and show what it finds: a table, JSON lines or pictures."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from export.signature import Detections
from pipeline.errors import RecipeError
from pipeline.report.gallery import PANEL_EDGE_PIXELS, captions_of, draw_boxes, draw_masks
from serving.client import TritonRunner, detect_images, served_models
from serving.mask_pasting import masks_in_image, run_lengths
from serving.preprocessing import read_image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")


def detect_and_show(
    images: list[Path],
    *,
    url: str,
    model: str | None,
    min_score: float,
    as_json: bool,
    draw: Path | None,
    console: Console,
) -> None:
    """Detect on each image and print a table, or a JSON line; with ``draw``, write pictures too.

    Args:
        draw: a file for one image; a folder, which is created, for several.
    """
    targets = _targets(images, draw)
    with TritonRunner(url, model or _only_model(url)) as runner:
        names = runner.signature.class_names
        for (path, found), target in zip(detect_images(runner, images), targets, strict=True):
            shown = found.above(min_score)
            if as_json:
                console.print_json(json.dumps(_record(path, shown, names)), indent=None)
            else:
                console.print(_table(path, shown, names))
            if target is not None:
                _draw(path, shown, names, target)
                if not as_json:
                    console.print(f"drawn: {target}")


def _targets(images: list[Path], draw: Path | None) -> list[Path | None]:
    """Where each picture goes; refused before anything is sent."""
    if draw is None:
        return [None] * len(images)
    if len(images) == 1 and not draw.is_dir():
        if draw.suffix.lower() not in PICTURE_SUFFIXES:
            raise RecipeError(f"--draw {draw}: expected a file ending in {', '.join(PICTURE_SUFFIXES)}, or a folder")
        return [draw]
    if draw.suffix:
        raise RecipeError(f"--draw {draw} is one file but there are {len(images)} images; give a folder")
    # Images of different folders may share a name.
    return [draw / f"{'_'.join(path.with_suffix('').parts[-2:])}.png" for path in images]


def _only_model(url: str) -> str:
    models = served_models(url)
    if len(models) != 1:
        raise RecipeError(f"the server at {url} serves {', '.join(models) or 'no model'}; name one with --model")
    return models[0]


def _draw(path: Path, found: Detections, names: tuple[str, ...], target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"--draw {target}: cannot create the folder ({error.strerror}); give another place"
        ) from error
    picture = Image.fromarray(read_image(path))
    if found.masks is not None:
        picture = draw_masks(picture, masks_in_image(found, picture.height, picture.width), found.labels)
    captions = captions_of(found.labels, found.scores, names)
    scale = max(1.0, PANEL_EDGE_PIXELS / max(picture.size))  # captions are unreadable on smaller pictures
    draw_boxes(picture, found.boxes, found.labels, captions, scale=scale).save(target)


def _record(path: Path, found: Detections, names: tuple[str, ...]) -> dict[str, object]:
    """What ``--json`` prints: a mask is COCO's run-length encoding of the pixels in the image."""
    entries: list[dict[str, object]] = [
        {"class": names[label], "score": round(float(score), 4), "box": [round(float(edge), 2) for edge in box]}
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True)
    ]
    if found.masks is not None:
        height, width = read_image(path).shape[:2]
        for entry, mask in zip(entries, masks_in_image(found, height, width), strict=True):
            entry["mask"] = run_lengths(mask)
    return {"image": str(path), "detections": entries}


def _table(path: Path, found: Detections, names: tuple[str, ...]) -> Table:
    table = Table(title=escape(f"{path}: {len(found)} detections"), title_justify="left")
    for column in ("class", "score", "x1", "y1", "x2", "y2"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
        table.add_row(escape(names[label]), f"{score:.2f}", *(f"{edge:.1f}" for edge in box))
    return table
