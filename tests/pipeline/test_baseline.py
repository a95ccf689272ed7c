"""The baseline of a training is found among the runs beside it, or the command that trains it is told."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Manifest, plain
from pipeline.baseline import NO_DISTILLER, baseline_command, distiller_name, find_baseline
from pipeline.recipe import load
from training.distillers import DISTILLERS

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "pipeline" / "tiny_recipe.py"


def train_manifest(distiller: str = "lgd", seed: int = 0, finished: str = "2026-01-01", **changed: Any) -> Manifest:
    """A training's manifest with the resolved sections of the tiny recipe."""
    recipe = load(TINY, [f"distiller={distiller}", f"training.seed={seed}"])
    values: dict[str, Any] = {
        "stage": "train", "stage_version": 1, "fingerprint": f"{distiller}{seed}", "inputs": {"data": "digest"},
        "config": {name: plain(recipe.section_json(name)) for name in ("model", "training", "distiller")},
        "environment": {}, "machine": {}, "files": {}, "facts": {}, "gates": [], "command": "c", "seconds": 1.0,
        "started": "s", "finished": finished,
    }  # fmt: skip
    return Manifest(**{**values, **changed})


def published(manifest: Manifest, directory: Path) -> Path:
    directory.mkdir(parents=True)
    manifest.write(directory)
    return directory.parent


def test_the_baseline_of_the_same_seed_comes_before_a_later_one_of_another(tmp_path: Path) -> None:
    train = train_manifest()
    published(train, tmp_path / "embedded" / "train")
    same = published(train_manifest("none"), tmp_path / "compare" / "embedded" / "none-1" / "seed-0" / "train")
    published(train_manifest("none", seed=1, finished="2027-01-01"), tmp_path / "other" / "train")
    found = find_baseline(tmp_path / "embedded", train)
    assert found is not None
    assert (found.run_dir, found.seed, found.same_seed) == (same, 0, True)


def test_of_two_with_another_seed_the_latest_is_taken(tmp_path: Path) -> None:
    published(train_manifest("none", seed=1, finished="2027-01-01"), tmp_path / "a" / "train")
    published(train_manifest("none", seed=2, finished="2026-01-01"), tmp_path / "b" / "train")
    found = find_baseline(tmp_path / "embedded", train_manifest())
    assert found is not None
    assert (found.run_dir.name, found.same_seed) == ("a", False)


def _other_training(manifest: Manifest) -> dict[str, Any]:
    return {**manifest.config, "training": {**manifest.config["training"], "max_iter": 5}}


def _other_model(manifest: Manifest) -> dict[str, Any]:
    return {**manifest.config, "model": {**manifest.config["model"], "num_classes": 99}}


@pytest.mark.parametrize(
    "changed",
    [
        {"inputs": {"data": "another digest"}},
        {"inputs": {"data": "digest", "backbone weights": "another start"}},
        {"gates": [{"name": "losses are finite", "value": None, "limit": None, "passed": False, "reason": ""}]},
        {"config": _other_training},
        {"config": _other_model},
    ],
)
def test_a_training_that_differs_in_more_than_the_distiller_is_no_baseline(changed: Any, tmp_path: Path) -> None:
    plain_training = train_manifest("none")
    values = {key: value(plain_training) if callable(value) else value for key, value in changed.items()}
    published(dataclasses.replace(plain_training, **values), tmp_path / "other" / "train")
    assert find_baseline(tmp_path / "embedded", train_manifest()) is None


def test_a_damaged_or_distilled_run_is_passed_over(tmp_path: Path) -> None:
    published(train_manifest("lgd", seed=1), tmp_path / "distilled" / "train")
    damaged = published(train_manifest("none"), tmp_path / "damaged" / "train") / "train" / "manifest.json"
    damaged.write_text(damaged.read_text()[:-20])
    assert find_baseline(tmp_path / "embedded", train_manifest()) is None


def test_every_distiller_is_called_what_the_command_line_calls_it() -> None:
    for name in DISTILLERS:
        assert distiller_name(load(TINY, [f"distiller={name}"]).section_json("distiller")) == name
    assert distiller_name({"_target_": "mine.Distiller"}) == "mine.Distiller"


def test_the_command_trains_the_baseline_of_the_same_recipe_beside_it() -> None:
    recipe = load(TINY, ["distiller=lgd", "distiller.loss_weight=0.5", "training.seed=3"])
    command = baseline_command(recipe, Path("elsewhere/mine"))
    words = shlex.split(command)
    assert words[words.index("run") :] == [
        "run", str(TINY), "training.seed=3", f"distiller={NO_DISTILLER}",
        "--runs", "elsewhere", "--name", "mine-baseline", "--until", "train",
    ]  # fmt: skip
    assert "--runs" not in baseline_command(recipe, Path("runs/mine"))
