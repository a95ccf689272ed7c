from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.detect import _targets
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
