"""The embedded data set: sprites pasted on photos, in COCO format with boxes, visible masks, crowds and empty images.

The same seed gives the same bytes on every machine: each image has a random stream of its own, seeded by (seed, split,
index), drawn from numpy's frozen ``RandomState`` and used with integer or exactly rounded arithmetic only, and Pillow
does the resampling and the JPEG. So the first images of a small set are those of a large one.

Shapes: H, W are an image's height and width in pixels; masks are (H, W) bool; boxes are COCO's x, y, width, height.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter
from pycocotools import mask as coco_mask

from training import embedded_sources as sources

CLASS_NAMES = tuple(entry.name for entry in sources.SPRITE_CLASSES)

_IMAGE_SIZES = ((256, 192), (192, 256), (256, 224), (224, 256), (224, 224), (256, 160), (256, 256), (240, 180))
# Square root of the box area in pixels: from, below, cumulative share. Small objects are most of what there is to find.
_SIZE_BANDS = ((9, 16, 0.12), (16, 30, 0.36), (30, 64, 0.82), (64, 140, 1.0))
_EMPTY_SHARE, _CROWD_SHARE = 0.03, 0.04
_MIN_VISIBLE_SHARE = 0.5  # of the pixels an object has in the image; more covered than this, nobody could label it
_MIN_INSIDE_SHARE = 0.7  # of the pixels an object would have without the image's border
_MIN_SIDE_PIXELS, _MAX_SIDE_PIXELS = 4, 150
_PLACEMENT_TRIALS = 6
_JPEG_QUALITY = 90


@dataclass
class _Placed:
    """One labelled thing in an image: its class index, full mask (before later things cover it), crowd or not."""

    class_index: int
    mask: np.ndarray
    num_pixels: int
    is_crowd: bool


@dataclass
class _Scene:
    """An image under composition."""

    canvas: Image.Image
    placed: list[_Placed]


def generate(
    directory: Path,
    *,
    num_train: int = 2000,
    num_validation: int = 400,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, Path]:
    """Write the data set into ``directory``.

    Args:
        directory: gets ``images/``, ``instances_train.json`` and ``instances_validation.json``.
        num_train: number of training images.
        num_validation: number of validation images.
        seed: of everything random.
        progress: called after each image with the number of images written and to be written.

    Returns:
        The two annotation files, training first.

    Raises:
        EmbeddedSourceMissing: if a package whose files the images are made of is not installed.
    """
    (directory / "images").mkdir(parents=True, exist_ok=True)
    num_images = {"train": num_train, "validation": num_validation}
    num_done = 0
    annotation_files = []
    for split in sources.SPLITS:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(num_images[split]):
            image, objects = compose_image(split, index, seed)
            file_name = f"{split}_{index:06d}.jpg"
            image.save(directory / "images" / file_name, quality=_JPEG_QUALITY)
            images.append({"id": index + 1, "file_name": file_name, "width": image.width, "height": image.height})
            for entry in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **entry})
            num_done += 1
            if progress is not None:
                progress(num_done, num_train + num_validation)
        annotation_files.append(directory / f"instances_{split}.json")
        annotation_files[-1].write_text(json.dumps(_coco_document(split, seed, images, annotations)), encoding="utf-8")
    return annotation_files[0], annotation_files[1]


def compose_image(split: str, index: int, seed: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    """One image of a split and its COCO annotations (without ``id`` and ``image_id``)."""
    random = np.random.RandomState([seed % 2**32, sources.SPLITS.index(split), index])
    scene = _Scene(canvas=_background(random, split), placed=[])
    kind = random.random_sample()
    for _ in range(random.randint(0, 3)):
        _paste_clutter(scene, random, split)
    if kind >= _EMPTY_SHARE:
        if kind < _EMPTY_SHARE + _CROWD_SHARE:
            _paste_crowd(scene, random, split)
        for _ in range(random.randint(2, 11)):
            _paste_object(scene, random, split)
    return _as_photographed(scene.canvas, random), _annotations(scene)


def _coco_document(split: str, seed: int, images: list[Any], annotations: list[Any]) -> dict[str, Any]:
    return {
        "info": {"description": f"embedded data set, {split} split, seed {seed}", "version": "1"},
        "licenses": [],
        "categories": [{"id": i + 1, "name": name, "supercategory": "sprite"} for i, name in enumerate(CLASS_NAMES)],
        "images": images,
        "annotations": annotations,
    }


def _pick(random: np.random.RandomState, items: tuple[Any, ...]) -> Any:
    return items[random.randint(len(items))]


def _jittered_colours(image: Image.Image, random: np.random.RandomState, strength: float) -> Image.Image:
    """Channels mixed towards a permutation of themselves (a turn of the hue), with a gain and an offset each."""
    mix = strength * random.random_sample()
    turn = random.randint(1, 3)
    matrix: list[float] = []
    for channel in range(3):
        gain = 1.0 + strength * (random.random_sample() - 0.5)
        row = [0.0, 0.0, 0.0]
        row[channel] += gain * (1.0 - mix)
        row[(channel + turn) % 3] += gain * mix
        matrix += [*row, 80.0 * strength * (random.random_sample() - 0.5)]
    return image.convert("RGB", tuple(matrix))


def _background(random: np.random.RandomState, split: str) -> Image.Image:
    """A crop of a photo, any scale, turned, mirrored, tinted, at times mixed with a second one."""
    size = _pick(random, _IMAGE_SIZES)
    layers = []
    for _ in range(1 + (random.random_sample() < 0.3)):
        photo = sources.photo(_pick(random, sources.photos(split)))
        scale = 0.35 + 0.65 * random.random_sample()
        width, height = max(32, int(photo.width * scale)), max(32, int(photo.height * scale))
        left, top = random.randint(photo.width - width + 1), random.randint(photo.height - height + 1)
        crop = photo.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
        if random.randint(2):
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        layers.append(_jittered_colours(crop, random, 0.4))
    return layers[0] if len(layers) == 1 else Image.blend(layers[0], layers[1], 0.25 + 0.5 * random.random_sample())


def _drawn_size(random: np.random.RandomState) -> float:
    """Square root of a box area in pixels."""
    share = random.random_sample()
    for start, stop, share_until in _SIZE_BANDS:
        if share < share_until:
            return start + (stop - start) * random.random_sample()
    raise AssertionError("the last band reaches up to 1")


def _drawn_sprite(path: Path, size: float, max_rotation: int, random: np.random.RandomState) -> Image.Image:
    """A sprite as it will be pasted: resized to ``size`` (root of the area, pixels), mirrored, turned, recoloured."""
    sprite = sources.sprite(path)
    stretch = 0.85 + 0.3 * random.random_sample()
    # Exactly rounded square roots: IEEE arithmetic gives the same size everywhere.
    ratio = math.sqrt(stretch * sprite.width / sprite.height)
    width, height = (min(max(int(side), _MIN_SIDE_PIXELS), _MAX_SIDE_PIXELS) for side in (size * ratio, size / ratio))
    sprite = sprite.resize((width, height), Image.Resampling.BILINEAR)
    if random.randint(2):
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if random.random_sample() < 0.6:
        sprite = sprite.rotate(
            int(random.randint(-max_rotation, max_rotation + 1)), Image.Resampling.BICUBIC, expand=True
        )
    alpha = sprite.getchannel("A")
    coloured = _jittered_colours(sprite.convert("RGB"), random, 0.2)
    if random.random_sample() < 0.2:
        coloured = coloured.filter(ImageFilter.GaussianBlur(0.5 + random.random_sample()))
    coloured.putalpha(alpha)
    return coloured


def _position(scene: _Scene, sprite: Image.Image, random: np.random.RandomState) -> tuple[int, int]:
    """Left and top of a sprite, up to a quarter of it outside; every other time close to a thing already there."""
    width, height = scene.canvas.size
    if scene.placed and random.randint(2):
        rows, columns = np.nonzero(scene.placed[random.randint(len(scene.placed))].mask)
        pixel = random.randint(len(rows))
        spread = max(sprite.size)
        x = int(columns[pixel]) + random.randint(-spread, spread + 1) - sprite.width // 2
        y = int(rows[pixel]) + random.randint(-spread, spread + 1) - sprite.height // 2
        return x, y
    x = random.randint(-sprite.width // 4, max(1, width - 3 * sprite.width // 4))
    y = random.randint(-sprite.height // 4, max(1, height - 3 * sprite.height // 4))
    return x, y


def _mask_at(sprite: Image.Image, position: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Where a sprite pasted at ``position`` covers an image of ``size`` (width, height): (H, W) bool."""
    layer = Image.new("L", size)
    layer.paste(sprite.getchannel("A"), position)
    return np.asarray(layer) >= 128


def _visible_masks(placed: list[_Placed]) -> list[np.ndarray]:
    """What of each mask the later ones leave uncovered."""
    visible: list[np.ndarray] = []
    covered: np.ndarray | None = None
    for thing in reversed(placed):
        visible.append(thing.mask if covered is None else thing.mask & ~covered)
        covered = thing.mask if covered is None else covered | thing.mask
    return visible[::-1]


def _leaves_all_visible(scene: _Scene, mask: np.ndarray) -> bool:
    """Whether everything placed so far would still show enough with ``mask`` on top."""
    return all(
        np.count_nonzero(visible & ~mask) >= _MIN_VISIBLE_SHARE * thing.num_pixels
        for thing, visible in zip(scene.placed, _visible_masks(scene.placed), strict=True)
    )


def _paste_object(scene: _Scene, random: np.random.RandomState, split: str) -> None:
    """Put one object where it and all others stay visible, or give up after a few trials."""
    class_index = random.randint(len(CLASS_NAMES))
    path = _pick(random, sources.object_sprites(split)[class_index])
    max_rotation = sources.SPRITE_CLASSES[class_index].max_rotation_degrees
    sprite = _drawn_sprite(path, _drawn_size(random), max_rotation, random)
    num_sprite_pixels = np.count_nonzero(np.asarray(sprite.getchannel("A")) >= 128)
    for _ in range(_PLACEMENT_TRIALS):
        position = _position(scene, sprite, random)
        mask = _mask_at(sprite, position, scene.canvas.size)
        num_pixels = int(np.count_nonzero(mask))
        if num_pixels >= max(16, _MIN_INSIDE_SHARE * num_sprite_pixels) and _leaves_all_visible(scene, mask):
            scene.canvas.paste(sprite, position, sprite)
            scene.placed.append(_Placed(class_index, mask, num_pixels, is_crowd=False))
            return


def _paste_crowd(scene: _Scene, random: np.random.RandomState, split: str) -> None:
    """A heap of tiny sprites of one class, labelled as one crowd region."""
    class_index = random.randint(len(CLASS_NAMES))
    width, height = scene.canvas.size
    centre_x, centre_y = random.randint(width // 4, 3 * width // 4), random.randint(height // 4, 3 * height // 4)
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(random.randint(12, 25)):
        path = _pick(random, sources.object_sprites(split)[class_index])
        sprite = _drawn_sprite(path, 8 + 8 * random.random_sample(), 20, random)
        position = (centre_x + random.randint(-28, 29), centre_y + random.randint(-20, 21))
        scene.canvas.paste(sprite, position, sprite)
        mask |= _mask_at(sprite, position, scene.canvas.size)
    scene.placed.append(_Placed(class_index, mask, int(np.count_nonzero(mask)), is_crowd=True))


def _paste_clutter(scene: _Scene, random: np.random.RandomState, split: str) -> None:
    """Something that is no object; pasted first, so it covers none."""
    sprite = _drawn_sprite(_pick(random, sources.clutter_sprites(split)), _drawn_size(random), 20, random)
    scene.canvas.paste(sprite, _position(scene, sprite, random), sprite)


def _as_photographed(canvas: Image.Image, random: np.random.RandomState) -> Image.Image:
    """Uneven light, at times a slight blur, and sensor noise."""
    low, high = 170 + random.randint(0, 86), 170 + random.randint(0, 86)
    shade = Image.linear_gradient("L").point([low + (high - low) * level // 255 for level in range(256)])
    shade = shade.rotate(90 * random.randint(4)).resize(canvas.size, Image.Resampling.BILINEAR)
    canvas = ImageChops.multiply(canvas, Image.merge("RGB", (shade, shade, shade)))
    if random.random_sample() < 0.25:
        canvas = canvas.filter(ImageFilter.GaussianBlur(0.4 + 0.5 * random.random_sample()))
    amplitude = random.randint(1, 8)
    pixels = np.asarray(canvas).astype(np.int16)
    noise = random.randint(-amplitude, amplitude + 1, size=(2, *pixels.shape), dtype=np.int16)
    return Image.fromarray(np.clip(pixels + noise[0] + noise[1], 0, 255).astype(np.uint8))


def _annotations(scene: _Scene) -> list[dict[str, Any]]:
    """COCO annotations: category, visible mask as compressed RLE, its pixel count and its tight box."""
    annotations = []
    for thing, visible in zip(scene.placed, _visible_masks(scene.placed), strict=True):
        rle = coco_mask.encode(np.asfortranarray(visible, dtype=np.uint8))
        rows, columns = np.nonzero(visible)
        left, top = int(columns.min()), int(rows.min())
        annotations.append(
            {
                "category_id": thing.class_index + 1,
                "bbox": [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top],
                "area": len(rows),
                "iscrowd": int(thing.is_crowd),
                "segmentation": {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")},
            }
        )
    return annotations
