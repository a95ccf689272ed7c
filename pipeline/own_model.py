"""The command that takes a detectron2 model that was trained elsewhere into a run folder of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

from export.config import ExportConfig
from export.parity import ParityConfig
from pipeline import recipe as recipes
from pipeline.artifact import digest
from pipeline.detectron2_config import Detectron2Config, read_detectron2_config
from pipeline.errors import RecipeError
from pipeline.overrides import apply_overrides
from pipeline.preflight import built, check_exportable
from pipeline.recipe import FOLDER_RECIPE, Recipe
from pipeline.run import run_stages
from pipeline.stages import IMPORTED_STAGES
from serving.config import BenchmarkConfig, ServingConfig
from training.dataset_config import DatasetConfig
from training.distillers import DISTILLERS
from training.imported_checkpoint import ImportConfig, imported_state
from training.student import class_owner


def export_own_model(
    config: str, weights: Path, overrides: Sequence[str], *, out: Path, force: bool, console: Console
) -> None:
    """Write the run folder of a model: its recipe, its checkpoint and its ONNX model.

    Everything that can be known to be wrong is refused before anything is written.

    Args:
        config: see :func:`pipeline.detectron2_config.read_detectron2_config`.
        weights: the checkpoint.
        overrides: as of any recipe; ``export.canvas`` is by default the size of detectron2's test images.
        out: the run folder.
        force: rebuild although nothing changed.

    Raises:
        RecipeError: the folder holds something else.
        GateFailed: the exported model depends on the batch.
        RecipeError, UnsupportedDetector, WeightsUnusable: see :func:`prepared`.
    """
    path = out.absolute() / FOLDER_RECIPE
    _check_folder(out, path)
    recipe, detector = prepared(config, weights, overrides, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recipes.save(recipe)
    recipe = recipes.load(path.parent)  # as every later command reads it
    (height, width), imported = recipe.sections["export"].canvas, recipe.sections["training"]
    data: DatasetConfig = recipe.sections["dataset"]
    names = imported.class_names_from if data.is_embedded else f"those of {data.validation}"
    console.print(f"export: {type(detector).__name__} on a canvas of {height} x {width} pixels")
    console.print(f"export: names of the {len(imported.class_names)} classes: {names}")
    run_stages(IMPORTED_STAGES, recipe, path.parent, until="export", force=force, console=console)
    missing = " dataset.validation=FILE" if data.is_embedded else ""
    console.print(f"measure and serve it: .venv/bin/python -m pipeline benchmark {out}{missing}")


def prepared(config: str, weights: Path, overrides: Sequence[str], path: Path) -> tuple[Recipe, nn.Module]:
    """The recipe of a model, which is to lie at ``path``, and the detector with its weights; writes nothing.

    Raises:
        RecipeError: configuration or overrides are wrong, or there is no checkpoint.
        UnsupportedDetector: there is no export graph for the detector on this canvas.
        WeightsUnusable: the checkpoint does not fit the detector.
    """
    if not weights.is_file():
        raise RecipeError(f"--weights {weights}: there is no such file; give the checkpoint of the detector")
    recipe, detector = recipe_and_detector(config, weights, overrides, path)
    check_exportable(detector, recipe.sections["export"])
    detector.load_state_dict(imported_state(detector, weights))
    return recipe, detector


def _check_folder(out: Path, recipe: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not recipe.is_file()):
        what = "a file" if out.is_file() else "a folder with other files in it"
        raise RecipeError(f"--out {out} is {what}; give a new folder, such as runs/NAME, or one that `export` wrote")


def recipe_and_detector(config: str, weights: Path, overrides: Sequence[str], path: Path) -> tuple[Recipe, nn.Module]:
    """The recipe of a model, which is to lie at ``path``, and the detector that it describes, with random weights.

    Raises:
        RecipeError: configuration or overrides are wrong.
    """
    source = read_detectron2_config(config)
    sections = OmegaConf.create(
        {
            "model": source.model,
            "dataset": L(DatasetConfig)(),
            "training": L(ImportConfig)(checkpoint=str(weights.absolute()), sha256=digest(weights)),
            "distiller": L(DISTILLERS["none"])(),
            "export": L(ExportConfig)(),
            "parity": L(ParityConfig)(),
            "serving": L(ServingConfig)(model_name=re.sub(r"[^A-Za-z0-9_-]", "_", path.parent.name)),
            "benchmark": L(BenchmarkConfig)(),
        },
        flags={"allow_objects": True},
    )
    apply_overrides(sections, overrides)
    num_classes = class_owner(sections["model"]).num_classes
    _name_classes(sections["training"], source.dataset_name, num_classes)
    given = recipes.from_sections(sections, path)  # every value is checked
    detector = built(sections["model"], num_classes, f"configuration {config}").eval()
    _complete_sizes(config, source, given.sections["export"], sections["export"], detector)
    return recipes.from_sections(sections, path), detector


def _name_classes(section: Any, dataset_name: str | None, num_classes: int) -> None:
    """Names and category ids, where no override gives them: by detectron2's own catalogue, or made up."""
    known = MetadataCatalog.get(dataset_name) if dataset_name is not None else None
    names, ids = list(getattr(known, "thing_classes", [])), {}
    if "class_names" in section:
        told = "as given"
    elif len(names) == num_classes:
        section["class_names"], told = names, f"those of {dataset_name}"
        ids = {label: number for number, label in getattr(known, "thing_dataset_id_to_contiguous_id", {}).items()}
    else:
        section["class_names"] = [f"class_{label}" for label in range(num_classes)]
        told = "made up, class_0 and so on, as no data set is named that knows them"
    section.setdefault("category_ids", [ids.get(label, label + 1) for label in range(num_classes)])
    section["class_names_from"] = told
    for key in ("class_names", "category_ids"):
        if len(section[key]) != num_classes:
            raise RecipeError(f"training.{key} has {len(section[key])} entries, expected {num_classes}, one of a class")


def _complete_sizes(
    config: str, source: Detectron2Config, given: ExportConfig, section: Any, detector: nn.Module
) -> None:
    """What no override says of canvas and edges: detectron2's test size, rounded up to the stride, or what fits."""
    short, longest = source.short_edge_pixels, source.max_edge_pixels
    if "canvas" in section:
        sizes = [min(given.canvas), max(given.canvas)]
        short, longest = (min(edge or size, size) for edge, size in zip((short, longest), sizes, strict=True))
    short, longest = section.get("short_edge_pixels", short), section.get("max_edge_pixels", longest)
    if short is None or longest is None:
        raise RecipeError(
            f"configuration {config} does not say with ResizeShortestEdge how large test images are; give "
            "export.canvas=[HEIGHT,WIDTH]"
        )
    stride = max(detector.backbone.size_divisibility, 1)
    section.setdefault("canvas", [-(-edge // stride) * stride for edge in (short, longest)])
    section["short_edge_pixels"], section["max_edge_pixels"] = short, longest
