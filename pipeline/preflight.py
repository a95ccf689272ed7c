"""Mistakes that would otherwise show after the training: found in the first seconds of a run."""

from __future__ import annotations

from export.detector_graph import detector_graph, signature_of
from pipeline.endpoint import check_server
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe
from training.config import TrainingConfig
from training.student import build_student
from training.train import distilled_detector

NUM_CLASSES = 2  # any number: what is checked does not depend on it


def preflight(recipe: Recipe) -> None:
    """Check that the recipe's parts fit each other and that the server can start here.

    Raises:
        RecipeError: the distiller's schedule lies outside the training.
        LgdInputError, UnsupportedDetector: distiller or export do not fit the student.
        ServerError: this machine lacks something that the server needs.
    """
    config: TrainingConfig = recipe.sections["training"]
    schedule = recipe.sections["distiller"].schedule()
    for name in ("distill_from_iter", "freeze_backbone_until_iter"):
        if getattr(schedule, name) >= config.max_iter:
            raise RecipeError(
                f"distiller.{name} is {getattr(schedule, name)} and training.max_iter is {config.max_iter}: "
                f"it would cover the whole training. Give distiller.{name}=N with N below training.max_iter, "
                f"for example {config.max_iter // 5}"
            )
    student = build_student(recipe.model, NUM_CLASSES).eval()
    distilled_detector(student, recipe.sections["distiller"])
    export = recipe.sections["export"]
    signature = signature_of(
        student,
        canvas=export.canvas,
        short_edge=export.short_edge_pixels,
        max_edge=export.max_edge_pixels,
        class_names=[str(i) for i in range(NUM_CLASSES)],
        category_ids=range(NUM_CLASSES),
        max_batch_size=export.max_batch_size,
    )
    detector_graph(student, signature)
    check_server(recipe.sections["serving"])
