from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from export.signature import Detections
from pipeline.detect import _draw, _record, _targets
from pipeline.errors import RecipeError


def test_one_image_is_drawn_into_the_file_that_is_named() -> None:
    assert _targets([Path("a/photo.jpg")], Path("out/drawn.png")) == [Path("out/drawn.png")]
    assert _targets([Path("photo.jpg")], None) == [None]


def test_several_images_are_drawn_into_a_folder_without_overwriting_each_other(tmp_path: Path) -> None:
    images = [Path("a/photo.jpg"), Path("b/photo.jpg")]
    targets = _targets(images, tmp_path)
    assert targets == [tmp_path / "a_photo.png", tmp_path / "b_photo.png"]


@pytest.mark.parametrize(
    ("images", "draw"), [(["a.jpg"], "drawn"), (["a.jpg"], "drawn.txt"), (["a.jpg", "b.jpg"], "drawn.png")]
)
def test_a_place_that_cannot_hold_the_pictures_is_refused_before_anything_is_sent(images: list[str], draw: str) -> None:
    with pytest.raises(RecipeError, match="--draw"):
        _targets([Path(image) for image in images], Path(draw))


@pytest.fixture
def square(tmp_path: Path) -> tuple[Path, Detections]:
    """A grey image, and one object whose mask is the left half of its box."""
    path = tmp_path / "grey.png"
    Image.fromarray(np.full((60, 80, 3), 100, np.uint8)).save(path)
    mask = np.zeros((1, 28, 28), np.float32)
    mask[..., :14] = 1
    found = Detections(
        boxes=np.array([[10, 20, 50, 40]], np.float32),
        scores=np.array([0.9], np.float32),
        labels=np.zeros(1, np.int32),
        masks=mask,
    )
    return path, found


def test_a_json_record_holds_each_mask_as_cocos_run_lengths(square: tuple[Path, Detections]) -> None:
    path, found = square
    (entry,) = _record(path, found, ("cell",))["detections"]  # type: ignore[misc]
    assert entry["mask"]["size"] == [60, 80]
    mask = coco_mask.decode(coco_mask.frPyObjects(entry["mask"], 60, 80)).astype(bool)
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 39, 10, 29)
    without = Detections(boxes=found.boxes, scores=found.scores, labels=found.labels)
    (entry,) = _record(path, without, ("cell",))["detections"]  # type: ignore[misc]
    assert set(entry) == {"class", "score", "box"}


def test_a_drawn_mask_tints_its_pixels_and_no_others(square: tuple[Path, Detections], tmp_path: Path) -> None:
    path, found = square
    _draw(path, found, ("cell",), tmp_path / "drawn.png")
    drawn = np.asarray(Image.open(tmp_path / "drawn.png").convert("RGB")).astype(int)
    scale = drawn.shape[1] / 80
    inside, outside = (drawn[int(30 * scale), int(x * scale)] for x in (20, 40))
    assert np.abs(outside - 100).max() <= 2
    assert np.abs(inside - 100).max() > 20
