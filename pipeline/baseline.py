"""Which training is the baseline of another: the same model, data and training without a distiller."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact import Manifest, read_manifest
from pipeline.errors import ArtifactError
from pipeline.recipe import Recipe

NO_DISTILLER = "none"
# Where trainings are found below the folder of all runs: runs of their own, and those of comparisons.
TRAININGS = ("*/train", "compare/*/*/*/train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """A finished training without a distiller.

    Attributes:
        run_dir: the run's folder.
        seed: of its training, and whether that is the seed of the training it is the baseline of.
    """

    run_dir: Path
    train: Manifest
    seed: int
    same_seed: bool


def distiller_name(section: Mapping[str, Any]) -> str:
    """What ``distiller=`` takes to get this resolved ``distiller`` section; its target for one of the user's own."""
    from training.distillers import DISTILLERS

    names = {f"{config.__module__}.{config.__qualname__}": name for name, config in DISTILLERS.items()}
    target = str(section.get("_target_"))
    return names.get(target, target)


def without_seed(training: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved ``training`` section without its seed."""
    return {key: value for key, value in training.items() if key != "seed"}


def find_baseline(run_dir: Path, train: Manifest) -> Baseline | None:
    """The baseline of a training, among the runs beside it; one with the same seed first, then the latest.

    Args:
        run_dir: of the training; its parent is the folder of all runs.
        train: manifest of the training.
    """
    found = []
    for pattern in TRAININGS:
        for directory in run_dir.parent.glob(pattern):
            try:
                manifest = read_manifest(directory)
            except ArtifactError:
                continue  # unfinished, damaged or not a training: no baseline of this one
            if _is_baseline(manifest, train):
                found.append((directory.parent, manifest))
    if not found:
        return None
    seed = train.config["training"].get("seed")
    directory, manifest = max(
        found, key=lambda run: (run[1].config["training"].get("seed") == seed, run[1].finished, str(run[0]))
    )
    its_seed = manifest.config["training"].get("seed")
    return Baseline(run_dir=directory, train=manifest, seed=its_seed, same_seed=its_seed == seed)


def baseline_command(recipe: Recipe, run_dir: Path) -> str:
    """The command that trains the baseline of a recipe's run, in a run folder beside it."""
    kept = [o for o in recipe.overrides if o.partition("=")[0].strip().partition(".")[0] != "distiller"]
    runs = () if run_dir.parent == Path("runs") else ("--runs", str(run_dir.parent))
    baseline = dataclasses.replace(
        recipe,
        overrides=(*kept, f"distiller={NO_DISTILLER}"),
        options=(*runs, "--name", f"{run_dir.name}-baseline"),
    )
    return f"{baseline.command} --until train"


def _is_baseline(manifest: Manifest, train: Manifest) -> bool:
    return (
        manifest.stage == "train"
        and not manifest.failed_gates
        and distiller_name(manifest.config.get("distiller") or {}) == NO_DISTILLER
        and manifest.inputs == train.inputs
        and manifest.config["model"] == train.config["model"]
        and without_seed(manifest.config["training"]) == without_seed(train.config["training"])
    )
