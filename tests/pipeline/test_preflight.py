from __future__ import annotations

from pathlib import Path

import pytest

from export.detector_graph import UnsupportedDetector
from pipeline import recipe as recipes
from pipeline.errors import RecipeError
from pipeline.preflight import preflight
from training.distillers.lgd.objects import LgdInputError

TINY = Path(__file__).with_name("tiny_recipe.py")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["training.max_iter=1"], RecipeError, r"distiller\.distill_from_iter is 1 and training\.max_iter is 1"),
        (["distiller=lgd"], RecipeError, r"distiller\.distill_from_iter is 30000"),
        (["distiller.num_heads=5"], LgdInputError, r"does not divide the 32 channels"),
        (["export.canvas=[100,128]"], UnsupportedDetector, r"nearest that is: 128 x 128"),
        (["export.canvas=[64,64]"], UnsupportedDetector, r"do not fit a canvas of 64 x 64"),
    ],
)
def test_what_would_fail_after_the_training_fails_before_it(
    overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        preflight(recipes.load(TINY, overrides))


def test_a_recipe_whose_parts_fit_passes() -> None:
    preflight(recipes.load(TINY))
    preflight(recipes.load(TINY, ["distiller=none"]))
