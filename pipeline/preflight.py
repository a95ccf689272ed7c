"""Mistakes that would otherwise show after the training: found in the first seconds of a run."""

from __future__ import annotations

from typing import Any

from torch import nn

from export.config import ExportConfig
from export.detector_graph import check_supported, detector_graph, signature_of
from pipeline.endpoint import check_server, check_serves_nms
from pipeline.errors import RecipeError
from pipeline.other_canvases import other_signatures
from pipeline.overrides import one_line
from pipeline.recipe import Recipe
from training.acceleration import check_compiler, check_precision
from training.config import TrainingConfig
from training.evaluate import resolve_device
from training.head_classes import class_count
from training.imported_checkpoint import ImportConfig
from training.initial_weights import check_initial_weights
from training.launch import check_launch, check_processes, parse_launch
from training.schedule import DistillationSchedule
from training.student import build_student
from training.tracking import check_tracker
from training.train import distilled_detector

NUM_CLASSES = 2  # any number: what is checked does not depend on it


def preflight(recipe: Recipe) -> None:
    """Check that the recipe's parts fit each other and this machine, and that the server can start here.

    Raises:
        RecipeError: the model cannot be built, the distiller's schedule lies outside the training, or the server's
            backend cannot do the NMS.
        UnsupportedStudent, StudentUnsuited, LgdInputError, UnsupportedDetector: distiller or export do not fit the
            student.
        LaunchError: the processes do not fit the batch or the machine.
        WeightsUnusable: the initial checkpoint is missing or belongs to another architecture.
        DeviceUnavailable, CompilerMissing, TrackerMissing: the machine lacks what the training section asks for.
        ServerError: this machine lacks something that the server needs.
    """
    config: TrainingConfig | ImportConfig = recipe.sections["training"]
    if isinstance(config, ImportConfig):
        resolve_device(config.device)
        student = built(recipe.model, NUM_CLASSES, f"recipe {recipe.path}").eval()
    else:
        check_schedule(recipe.sections["distiller"].schedule(), config)
        check_machine(config, recipe.launch)
        student = built(recipe.model, NUM_CLASSES, f"recipe {recipe.path}").eval()
        distilled_detector(student, recipe.sections["distiller"])
        if config.init_checkpoint is not None:
            check_initial_weights(student, config.init_checkpoint)
    check_exportable(student, recipe.sections["export"])
    check_serves_nms(recipe.sections["export"].nms, recipe.sections["serving"])
    check_server(recipe.sections["serving"])


def check_exportable(detector: nn.Module, config: ExportConfig) -> None:
    """Refuse a detector that has no export graph on one of the canvases.

    Raises:
        UnsupportedDetector: names the part and what is supported.
    """
    check_supported(detector)
    num_classes = class_count(detector)
    signature = signature_of(
        detector,
        canvas=config.canvas,
        short_edge=config.short_edge_pixels,
        max_edge=config.max_edge_pixels,
        class_names=[str(i) for i in range(num_classes)],
        category_ids=range(num_classes),
        max_batch_size=config.max_batch_size,
    )
    for each in (signature, *other_signatures(signature, config)):
        detector_graph(detector, each, config.nms)


def check_schedule(schedule: DistillationSchedule, config: TrainingConfig) -> None:
    """Refuse a distiller that would never act, or a network that would never be trained.

    Raises:
        RecipeError: names the key.
    """
    for name in ("distill_from_iter", "freeze_backbone_until_iter"):
        if getattr(schedule, name) >= config.max_iter:
            raise RecipeError(
                f"distiller.{name} is {getattr(schedule, name)} and training.max_iter is {config.max_iter}: "
                f"it would cover the whole training. Give distiller.{name}=N with N below training.max_iter, "
                f"for example {config.max_iter // 5}"
            )
    until = schedule.distill_until_iter
    if until is not None and until <= schedule.distill_from_iter:
        raise RecipeError(
            f"distiller.distill_until_iter is {until} and distiller.distill_from_iter {schedule.distill_from_iter}: "
            "nothing would be distilled; give a later end, or null for none"
        )


def check_machine(config: TrainingConfig, launch: str | None) -> None:
    """Refuse what this machine cannot train: processes, device, precision, compiler, tracker.

    Raises:
        LaunchError, DeviceUnavailable, CompilerMissing, TrackerMissing: see :mod:`training`.
    """
    if launch is None:
        check_processes(config, 1)
    else:
        check_launch(parse_launch(launch), config)
    device = resolve_device(config.device)
    check_precision(config, device)
    check_tracker(config)
    if config.compile:
        check_compiler(device)


def built(model: Any, num_classes: int, named: str) -> nn.Module:
    """A stock detector of a lazy tree with random weights; ``named`` is what messages call where it stands.

    Raises:
        RecipeError: says which part of the model could not be built.
    """
    try:
        return build_student(model, num_classes)
    except Exception as error:
        if isinstance(getattr(type(error), "exit_code", None), int):
            raise
        raise RecipeError(f"{named}: its model cannot be built: {type(error).__name__}: {one_line(error)}") from error
