"""Image file -> canvas that the exported graph takes, and its detections back to the image's own pixels.

Numpy and PIL only. The resize equals detectron2's ``ResizeShortestEdge`` + ``ResizeTransform`` bit by bit, because
accuracy lost between training's resize and the client's is lost silently.

Shape legend: H x W the image or the canvas, M detections.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from export.signature import Detections, DetectorSignature
from serving.mask_pasting import cropped_mask

MAX_IMAGE_PIXELS = 178_956_970
"""Largest image that is decoded: 512 MiB as RGB, and PIL's own hard limit."""

_EXIF_ORIENTATION_TAG = 0x0112
_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What PIL's decoders raise for damaged files, found by truncating and flipping bytes of JPEG, PNG, GIF and TIFF.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


class ImageError(ValueError):
    """An image file that cannot be used: missing, not an image, truncated or too large to decode."""

    exit_code = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an image lies on its canvas, as what is needed to map boxes back.

    Attributes:
        image_height, image_width: the original image, in pixels.
        scale_x, scale_y: original pixels per canvas pixel.
    """

    image_height: int
    image_width: int
    scale_x: float
    scale_y: float


def read_image(path: Path, *, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Read an image file as detectron2's ``read_image(path, "RGB")`` does.

    Args:
        path: any format PIL reads.
        max_pixels: the header's width times height above which nothing is decoded.

    Returns:
        (H, W, 3) uint8 RGB, turned as its EXIF orientation says.

    Raises:
        ImageError: the file is missing, no image, truncated, or larger than ``max_pixels``.
    """
    if not Path(path).is_file():
        raise ImageError(f"{path}: no such image file; check the path")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _too_large(path, f"{width} x {height} = {width * height:,} pixels", max_pixels)
            return np.array(_upright(image).convert("RGB"))
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error), max_pixels) from None
    except ImageError:
        raise
    except _DECODING_ERRORS as error:
        raise ImageError(
            f"{path}: cannot be decoded as an image ({error}); it is truncated, damaged or not an image file. "
            "Replace it or leave it out"
        ) from error


def _too_large(path: Path, found: str, max_pixels: int) -> ImageError:
    return ImageError(
        f"{path}: image too large to decode, found {found}, expected at most {max_pixels:,} pixels; "
        "scale it down or cut it into tiles first"
    )


def _upright(image: Image.Image) -> Image.Image:
    """The image turned by its EXIF orientation; unreadable EXIF data means no turn, as in detectron2."""
    try:
        method = _TRANSPOSE_OF_ORIENTATION.get(image.getexif().get(_EXIF_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF blocks raise anything; detectron2 issue 1885
        return image
    return image if method is None else image.transpose(method)


def resized_shape(height: int, width: int, signature: DetectorSignature) -> tuple[int, int]:
    """Height and width after detectron2's ``ResizeShortestEdge.get_output_shape``.

    An image whose resized shape does not fit the canvas (a portrait on a landscape canvas, say) is scaled down once
    more, to fit; with a canvas of at least ``max_edge_pixels`` on both sides that never happens.
    """
    scale = signature.short_edge_pixels * 1.0 / min(height, width)
    # detectron2 takes the short edge as the exact target, not as a product that may round differently.
    short = signature.short_edge_pixels * 1.0
    new_height, new_width = (short, scale * width) if height < width else (scale * height, short)
    if max(new_height, new_width) > signature.max_edge_pixels:
        shrink = signature.max_edge_pixels * 1.0 / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    if int(new_height + 0.5) > signature.canvas_height or int(new_width + 0.5) > signature.canvas_width:
        shrink = min(signature.canvas_height / new_height, signature.canvas_width / new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def canvas_from_image(image: np.ndarray, signature: DetectorSignature) -> tuple[np.ndarray, Placement]:
    """Resize an image as training does, put it top-left on the canvas and pad the rest.

    Args:
        image: (H, W, 3) uint8 RGB.
        signature: says the canvas, the resize rule, the channel order and the pad value.

    Returns:
        The canvas, (3, H, W) uint8 in the signature's channel order, and how to map boxes back.

    Raises:
        ValueError: ``image`` has another dtype or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image: found {image.dtype} {image.shape}, expected uint8 (height, width, 3) in RGB order")
    height, width = image.shape[:2]
    new_height, new_width = resized_shape(height, width, signature)
    resized = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR))
    if signature.channel_order == "BGR":
        resized = resized[:, :, ::-1]
    canvas = np.empty(signature.image_shape, np.uint8)
    canvas[:] = np.array(signature.pad_value, np.uint8)[:, None, None]
    canvas[:, :new_height, :new_width] = resized.transpose(2, 0, 1)
    placement = Placement(
        image_height=height, image_width=width, scale_x=width / new_width, scale_y=height / new_height
    )
    return canvas, placement


def detections_in_image(detections: Detections, placement: Placement) -> Detections:
    """Map detections from canvas pixels to the original image as detectron2's ``detector_postprocess`` does.

    Returns:
        Boxes scaled in float32, clipped to the image, those without area dropped. A mask stays the mask of its box:
        where a box reached into the padding, its mask is cut off with it.
    """
    scale = np.array([placement.scale_x, placement.scale_y] * 2, np.float32)
    limit = np.array([placement.image_width, placement.image_height] * 2, np.float32)
    scaled = detections.boxes.astype(np.float32, copy=False) * scale
    boxes = np.clip(scaled, np.float32(0), limit)
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    masks = detections.masks
    if masks is not None:
        masks = masks.copy()
        for i in np.flatnonzero(keep & (boxes != scaled).any(axis=1)).tolist():
            masks[i] = cropped_mask(masks[i], scaled[i], boxes[i])
    return dataclasses.replace(detections, boxes=boxes, masks=masks).where(keep)
