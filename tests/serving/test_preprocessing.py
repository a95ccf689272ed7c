"""Preprocessing is detectron2's own, shown against detectron2's classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image as detectron2_read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from PIL import Image

from export.signature import Detections, DetectorSignature
from serving.preprocessing import ImageError, canvas_from_image, detections_in_image, read_image, resized_shape

SIZES = [(480, 640), (640, 480), (500, 500), (333, 1999), (97, 61), (800, 1333), (427, 640), (2000, 200)]


def signature_of(short: int, longest: int, canvas: tuple[int, int], order: str = "RGB") -> DetectorSignature:
    return DetectorSignature(
        canvas_height=canvas[0],
        canvas_width=canvas[1],
        short_edge_pixels=short,
        max_edge_pixels=longest,
        channel_order=order,  # type: ignore[arg-type]
        pad_value=(104, 116, 124),
        max_batch_size=4,
        max_detections=10,
        score_threshold=0.05,
        nms_threshold=0.5,
        class_names=("a",),
        category_ids=(1,),
    )


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(("short", "longest"), [(256, 256), (192, 256), (800, 1333), (37, 61)])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_the_canvas_holds_detectron2s_resize_bit_by_bit_and_the_rest_is_pad_value(
    short: int, longest: int, order: str
) -> None:
    signature = signature_of(short, longest, (longest, longest), order)
    for height, width in SIZES if short < 800 else SIZES[:2]:
        image = random_image(height, width)
        in_order = image if order == "RGB" else image[:, :, ::-1]
        expected = ResizeShortestEdge(short, longest).get_transform(in_order).apply_image(in_order)
        canvas, placement = canvas_from_image(image, signature)
        new_height, new_width = expected.shape[:2]
        np.testing.assert_array_equal(canvas[:, :new_height, :new_width], expected.transpose(2, 0, 1))
        for channel, pad in enumerate(signature.pad_value):
            assert (canvas[channel, new_height:] == pad).all()
            assert (canvas[channel, :, new_width:] == pad).all()
        assert (placement.scale_x, placement.scale_y) == (width / new_width, height / new_height)


def test_the_resized_shape_is_detectron2s_for_every_small_size() -> None:
    signature = signature_of(37, 61, (61, 61))
    for height in range(20, 130):
        for width in range(20, 130):
            expected = ResizeShortestEdge.get_output_shape(height, width, 37, 61)
            assert resized_shape(height, width, signature) == expected


def test_an_image_too_thin_for_detectron2_keeps_one_pixel() -> None:
    assert resized_shape(1, 3000, signature_of(192, 256, (256, 256))) == (1, 256)


def test_an_image_that_does_not_fit_the_canvas_is_scaled_down_to_fit() -> None:
    signature = signature_of(48, 64, (48, 64))
    assert resized_shape(640, 480, signature) == (48, 36)
    canvas, placement = canvas_from_image(random_image(640, 480), signature)
    assert canvas.shape == (3, 48, 64)
    assert placement.scale_y == 640 / 48


def test_boxes_come_back_as_from_detector_postprocess_bit_by_bit() -> None:
    signature = signature_of(192, 256, (256, 256))
    generator = np.random.default_rng(1)
    for height, width in [(480, 640), (641, 333), (100, 90)]:
        _, placement = canvas_from_image(random_image(height, width), signature)
        corners = generator.uniform(-20, 276, (200, 4)).astype(np.float32)
        corners[:10, 2:] = corners[:10, :2]  # no area
        scores = np.sort(generator.uniform(0, 1, 200).astype(np.float32))[::-1].copy()
        labels = generator.integers(0, 5, 200).astype(np.int32)
        instances = Instances(resized_shape(height, width, signature))
        instances.pred_boxes = Boxes(torch.from_numpy(corners.copy()))
        instances.scores, instances.pred_classes = torch.from_numpy(scores), torch.from_numpy(labels)
        expected = detector_postprocess(instances, height, width)

        found = detections_in_image(Detections(boxes=corners, scores=scores, labels=labels), placement)
        np.testing.assert_array_equal(found.boxes, expected.pred_boxes.tensor.numpy())
        np.testing.assert_array_equal(found.scores, expected.scores.numpy())
        np.testing.assert_array_equal(found.labels, expected.pred_classes.numpy())


def test_a_box_maps_through_the_canvas_and_back() -> None:
    signature = signature_of(192, 256, (256, 256))
    _, placement = canvas_from_image(random_image(480, 640), signature)
    box = np.array([[64, 48, 320, 240]], np.float32)
    on_canvas = box / np.array([placement.scale_x, placement.scale_y] * 2, np.float32)
    one = Detections(boxes=on_canvas, scores=np.ones(1, np.float32), labels=np.zeros(1, np.int32))
    np.testing.assert_allclose(detections_in_image(one, placement).boxes, box, rtol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_by_its_exif_orientation_as_detectron2_does(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    Image.fromarray(random_image(30, 50)).save(path, exif=exif)
    np.testing.assert_array_equal(read_image(path), detectron2_read_image(str(path), "RGB"))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_pixel_formats_become_rgb_as_detectron2_does(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    Image.fromarray(random_image(30, 50)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (30, 50, 3)
    np.testing.assert_array_equal(image, detectron2_read_image(str(path), "RGB"))


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.jpg: no such image file"):
        read_image(tmp_path / "nowhere.jpg")
    assert ImageError.exit_code == 2


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tiff", "webp", "bmp"])
def test_a_truncated_image_is_named_whatever_its_format(tmp_path: Path, suffix: str) -> None:
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    Image.fromarray(random_image(64, 64)).save(whole)
    content = whole.read_bytes()
    for length in (0, 1, 10, len(content) // 2, int(len(content) * 0.9)):
        path.write_bytes(content[:length])
        with pytest.raises(ImageError, match=rf"cut\.{suffix}: cannot be decoded as an image"):
            read_image(path)


def test_a_file_of_random_bytes_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "noise.jpg"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ImageError, match="not an image file"):
        read_image(path)


def test_a_gigantic_image_is_refused_by_its_header_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    # 1 bit a pixel: 200 million pixels in 25 KB of file.
    Image.new("1", (20000, 10000)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(ImageError, match=r"bomb\.png: image too large to decode.*at most 178,956,970 pixels"):
        read_image(path)
    Image.new("1", (2000, 1000)).save(path)
    with pytest.raises(ImageError, match="2000 x 1000 = 2,000,000 pixels, expected at most 1,000,000"):
        read_image(path, max_pixels=1_000_000)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 0, 3), np.uint8)]
)
def test_an_array_that_is_no_rgb_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(height, width, 3\)"):
        canvas_from_image(image, signature_of(48, 64, (64, 64)))
