"""The first stages of a model that was trained elsewhere: its data set, if one is named, and its checkpoint."""

from __future__ import annotations

from typing import Any

from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from pipeline.artifact import digest
from pipeline.errors import RecipeError
from pipeline.overrides import target_of
from pipeline.stage import Gate, StageContext, StageResult
from pipeline.training_stages import (
    REMOVED_TENSORS_FILE,
    STUDENT_CHECKPOINT,
    checked_data,
    dataset_of,
    student_of,
)
from training.checkpoint import write_atomically
from training.dataset_config import DatasetConfig
from training.dataset_formats import datasets_to_measure_on
from training.detectors.yacs_detector import yacs_config, yacs_detector
from training.imported_checkpoint import ImportConfig, imported_state
from training.mask_annotations import check_masks
from training.strip import Part

MODEL_CONFIG = "config.yaml"


def data(context: StageContext) -> StageResult:
    """Check the data set that the model is measured on; without one, only its class names are known."""
    config: DatasetConfig = context.recipe.sections["dataset"]
    imported: ImportConfig = context.recipe.sections["training"]
    if config.is_embedded:
        facts = {"class_names": imported.class_names, "category_ids": imported.category_ids}
        reason = "no data set is named (dataset.validation=FILE)"
        return StageResult(facts={"status": "not run", "reason": reason, "embedded": False, **facts})
    own = datasets_to_measure_on(config)
    names = own["validation"].dataset.class_names
    expected = imported.class_names
    if len(names) != len(expected):
        raise RecipeError(
            f"dataset.validation={config.validation} has {len(names)} categories and the detector {len(expected)} "
            "classes; name a data set with the classes that it was trained on, in the order of their ids"
        )
    if sorted(names) == sorted(expected) and names != expected:
        label = next(i for i, (ours, theirs) in enumerate(zip(names, expected, strict=True)) if ours != theirs)
        raise RecipeError(
            f"dataset.validation={config.validation} has the detector's classes in another order: label {label} is "
            f"{names[label]!r} there and {expected[label]!r} by {imported.class_names_from}; renumber its categories"
        )
    return checked_data(context, own)


def strip(context: StageContext) -> StageResult:
    """Keep the imported model as a student checkpoint, with the configuration that builds it in plain detectron2."""
    imported: ImportConfig = context.recipe.sections["training"]
    student = student_of(context)
    if "validation" in context.inputs["data"].manifest.facts:
        check_masks(student, dataset_of(context.inputs["data"], "validation"))
    found = digest(imported.checkpoint) if imported.checkpoint.is_file() else "no file"
    if found != imported.sha256:
        raise RecipeError(
            f"{imported.checkpoint} has sha256 {found}, expected {imported.sha256}, the one that was exported; put "
            "that file back, or give `export` the new one"
        )
    state = imported_state(student, imported.checkpoint)
    write_atomically({"model": state}, context.directory / STUDENT_CHECKPOINT)
    (context.directory / REMOVED_TENSORS_FILE).write_text("[]")
    _write_config(context, len(context.inputs["data"].manifest.facts["class_names"]))
    kept = Part(
        part="student",
        num_parameters=sum(tensor.numel() for tensor in state.values()),
        size_bytes=sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
    )
    facts: dict[str, Any] = {
        "imported_from": {"checkpoint": str(imported.checkpoint), "sha256": imported.sha256},
        "num_tensors": len(state),
        "kept": kept,
    }
    gate = Gate(
        name="tensors of the checkpoint are those of the stock detector",
        value=len(state),
        limit=len(student.state_dict()),
        passed=True,
        reason="none missing, none left over, all shapes equal; anything else is refused",
    )
    return StageResult(facts=facts, gates=[gate])


def _write_config(context: StageContext, num_classes: int) -> None:
    """What builds the detector without this project, whichever kind of configuration it came with."""
    model, path = context.recipe.model, context.directory / MODEL_CONFIG
    if target_of(model) is yacs_detector:
        path.write_text(yacs_config(num_classes=num_classes, config=model["config"]).dump())
    else:
        LazyConfig.save(OmegaConf.create({"model": model}, flags={"allow_objects": True}), str(path))
