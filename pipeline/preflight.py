"""Mistakes that would otherwise show after the training: found in the first seconds of a run."""

from __future__ import annotations

from typing import Any

from torch import nn

from export.config import AS_EXPORTED, ExportConfig
from export.detector_graph import check_supported, detector_graph, signature_of
from export.precision import check_modelopt, num_calibration_images
from export.targets.tensorrt_target import UnsupportedEngine, incapable
from pipeline.endpoint import check_served_precision, check_server, check_serves_batches, check_serves_nms
from pipeline.errors import RecipeError
from pipeline.other_canvases import other_signatures
from pipeline.overrides import one_line
from pipeline.recipe import Recipe
from training.acceleration import check_compiler, check_precision
from training.config import TrainingConfig
from training.dataset_config import DatasetConfig
from training.dataset_formats import own_datasets
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


def preflight(recipe: Recipe, *, serves: bool = True) -> None:
    """Check that the recipe's parts fit each other and this machine, and that the server can start here.

    Args:
        serves: whether the run goes on to a server, which must compute in the recipe's precision then.

    Raises:
        RecipeError: the model cannot be built, the distiller's schedule lies outside the training, the server's backend
            cannot do the NMS or the batches, or a model that was trained elsewhere has no images to calibrate its
            precision on.
        UnsupportedStudent, StudentUnsuited, LgdInputError, UnsupportedDetector: distiller or export do not fit the
            student.
        LaunchError: the processes do not fit the batch or the machine.
        WeightsUnusable: the initial checkpoint is missing or belongs to another architecture.
        DeviceUnavailable, CompilerMissing, TrackerMissing: the machine lacks what the training section asks for.
        ModelOptMissing, TooFewCalibrationImages, UnsupportedEngine, Unavailable: the precision cannot be made, built
            or served.
        ServerError: this machine lacks something that the server needs.
    """
    config: TrainingConfig | ImportConfig = recipe.sections["training"]
    export, serving = recipe.sections["export"], recipe.sections["serving"]
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
    check_exportable(student, export)
    check_conversion(export, recipe.sections["dataset"], imported=isinstance(config, ImportConfig))
    check_serves_nms(export.nms, serving)
    check_serves_batches(export.min_batch_size, serving)
    if serves:
        check_served_precision(export.precision, serving)
    check_server(serving)


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


def check_conversion(export: ExportConfig, dataset: DatasetConfig, *, imported: bool) -> None:
    """Refuse a precision that this machine cannot make, that no architecture has, or that lacks calibration images.

    Args:
        imported: whether the model was trained elsewhere; only then may there be no training set.

    Raises:
        RecipeError: there is none.
        ModelOptMissing, TooFewCalibrationImages, UnsupportedEngine: see :mod:`export`.
    """
    if export.precision in AS_EXPORTED:
        return
    check_modelopt(export.precision)
    excluded = incapable(export.precision, export.compute_capabilities)
    if excluded and len(excluded) == len(export.compute_capabilities):
        raise UnsupportedEngine(f"export.compute_capabilities: {'; '.join(excluded.values())}; name others")
    own = dataset.train is not None
    if imported and not own:
        raise RecipeError(
            f"export.precision={export.precision} is calibrated on training images and the run names none: give "
            "dataset.train=FILE, in the format of dataset.validation=FILE, or export.precision=fp32"
        )
    num_images = own_datasets(dataset)["train"].dataset.num_images if own else dataset.num_train
    num_calibration_images(export, num_images)


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
