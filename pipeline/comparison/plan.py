"""What a comparison trains: the command line's recipes, loaded, checked against each other and given a folder each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import recipe as recipes
from pipeline.artifact import fingerprint
from pipeline.baseline import without_seed
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe

SEED_KEY = "training.seed"
DATA_STAGE = "data"
MAX_SLUG_CHARACTERS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One recipe of the comparison.

    Attributes:
        label: as the tables call it: the recipe's name with its own overrides.
        given: the recipe's name or file, as typed.
        recipe: with all overrides but the seed's.
        folder: its name below the comparison's folder. It follows from what decides the training, so a changed
            override gets another folder and an earlier training is found again.
    """

    label: str
    given: str
    recipe: Recipe
    folder: str

    def seeded(self, seed: int) -> Recipe:
        """The recipe with a seed of training."""
        seeded = recipes.load(self.given, [*self.recipe.overrides, f"{SEED_KEY}={seed}"])
        return dataclasses.replace(seeded, launch=self.recipe.launch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A comparison: every contender is trained once with each seed from 0 to ``num_seeds - 1``."""

    name: str
    directory: Path
    num_seeds: int
    contenders: tuple[Contender, ...]

    @property
    def data_dir(self) -> Path:
        """The run folder whose data artifact all trainings read."""
        return self.directory / f"data-{fingerprint(self.contenders[0].recipe.section_json('dataset'))[:8]}"

    def run_dir(self, contender: Contender, seed: int) -> Path:
        """The run folder of one training."""
        return self.directory / contender.folder / f"seed-{seed}"

    def trainings(self) -> list[tuple[Contender, int]]:
        """In the order in which they are done: all contenders with the first seed, then with the next."""
        return [(contender, seed) for seed in range(self.num_seeds) for contender in self.contenders]


def make_plan(
    arguments: Sequence[str], *, num_seeds: int, runs: Path, name: str | None, launch: str | None = None
) -> Plan:
    """Read the command line's arguments and check that what they name can be compared.

    Args:
        arguments: recipes, each a name or file and its own overrides after commas (``embedded,distiller=none``), and
            overrides for all of them (``section.key=value``), in any order. A recipe's own override wins.
        name: of the comparison's folder in ``runs/compare``; None: the first recipe's name.
        launch: the command that starts the processes of each training; None: one process.

    Raises:
        RecipeError: no recipe, one that cannot be loaded, two that train the same, different data sets, an override
            of the seed, or no evaluation at the end of training.
    """
    given = [split_at_commas(argument) for argument in arguments]
    shared = [argument for argument, (head, *_) in zip(arguments, given, strict=True) if "=" in head]
    wanted = [parts for parts in given if "=" not in parts[0]]
    if not wanted:
        raise RecipeError("compare needs a recipe, for example: compare embedded,distiller=none embedded --seeds 3")
    stems = [Path(path).stem for path, *_ in wanted]
    contenders = []
    for (path, *own), stem in zip(wanted, stems, strict=True):
        for override in (*shared, *own):
            if override.partition("=")[0].strip() == SEED_KEY:
                raise RecipeError(f"override {override!r}: compare sets {SEED_KEY} itself, to 0, 1, … below --seeds")
        ambiguous = {other for other, *_ in wanted if Path(other).stem == stem} != {path}
        label = ",".join([path if ambiguous else stem, *own])
        recipe = dataclasses.replace(recipes.load(path, [*shared, *own]), launch=launch)
        contenders.append(Contender(label=label, given=path, recipe=recipe, folder=_folder(label, recipe)))
    _check_comparable(contenders)
    directory = runs / "compare" / (name or stems[0])
    return Plan(name=directory.name, directory=directory, num_seeds=num_seeds, contenders=tuple(contenders))


def split_at_commas(argument: str) -> list[str]:
    """``a,export.canvas=[512,512]`` is ``a`` and ``export.canvas=[512,512]``: a comma in brackets or quotes is kept."""
    parts, depth, quote = [""], 0, ""
    for character in argument:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    return parts


def training_sections(recipe: Recipe, *leave_out: str) -> dict[str, Any]:
    """The sections that decide a training, without its seed and without those named."""
    names = [name for name in ("dataset", "model", "training", "distiller") if name not in leave_out]
    found = {name: recipe.section_json(name) for name in names}
    return found | {"training": without_seed(found["training"])}


def _folder(label: str, recipe: Recipe) -> str:
    slug = re.sub(r"[^\w.=-]+", "_", label)[:MAX_SLUG_CHARACTERS].strip("_.")
    return f"{slug}-{fingerprint(training_sections(recipe))[:8]}"


def _check_comparable(contenders: Sequence[Contender]) -> None:
    first = contenders[0]
    seen: dict[str, str] = {}
    for contender in contenders:
        differing = _differing(first.recipe.section_json("dataset"), contender.recipe.section_json("dataset"))
        if differing:
            raise RecipeError(
                f"compare: {first.label} and {contender.label} have different data sets ({'; '.join(differing)}), so "
                "their AP cannot be compared; give the same dataset.key=value for all of them"
            )
        mark = fingerprint(training_sections(contender.recipe))
        if mark in seen:
            raise RecipeError(f"compare: {seen[mark]} and {contender.label} train the same; leave one out")
        seen[mark] = contender.label
        evaluate_at = contender.recipe.sections["training"].evaluate_at
        if 1.0 not in evaluate_at:
            raise RecipeError(
                f"compare: {contender.label} has training.evaluate_at={list(evaluate_at)}, expected 1.0 among them: "
                "what is compared is the AP at the end of training"
            )


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [f"dataset.{key} {a.get(key)} and {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]
