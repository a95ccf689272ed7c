"""The stages that end at a student checkpoint: data, train, strip."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.artifact import Artifact
from pipeline.baseline import distiller_name
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe
from pipeline.stage import Gate, StageContext, StageResult
from training.checkpoint import FINAL_CHECKPOINT
from training.dataset import CocoDataset, check_readable, check_same_classes, read_coco
from training.dataset_config import DatasetConfig
from training.dataset_formats import own_datasets
from training.embedded_dataset import generate
from training.evaluate import inference_loader
from training.own_dataset import OwnDataset
from training.strip import strip as strip_checkpoint
from training.student import build_student, class_owner
from training.tracking import METRICS_FILE
from training.train import TrainingResult, distilled_detector
from training.train import train as train_student

STUDENT_CHECKPOINT = "student.pth"
REMOVED_TENSORS_FILE = "removed_tensors.json"
NUM_PROBE_IMAGES = 8
NUM_CLASSES_UNSAID = 80  # what the recipes' model parts start from


def data(context: StageContext) -> StageResult:
    """Generate the embedded data set, or check the user's."""
    config: DatasetConfig = context.recipe.sections["dataset"]
    if config.is_embedded:
        context.console.print(f"data: composing {config.num_train + config.num_validation} images")
        train_file, validation_file = generate(
            context.directory, num_train=config.num_train, num_validation=config.num_validation, seed=config.seed
        )
        named = {"train": train_file, "validation": validation_file}
        own = {split: OwnDataset(dataset=read_coco(file)) for split, file in named.items()}
    else:
        own = own_datasets(config)
    check_same_classes(own["train"].dataset, own["validation"].dataset)
    return checked_data(context, own)


def checked_data(context: StageContext, own: Mapping[str, OwnDataset]) -> StageResult:
    """The data artifact of these splits: what had to be changed of them on a copy, every image decoded."""
    config: DatasetConfig = context.recipe.sections["dataset"]
    facts: dict[str, Any] = {
        "embedded": config.is_embedded,
        "class_names": own["validation"].dataset.class_names,
        "category_ids": own["validation"].dataset.category_ids,
    }
    num_checked = 0
    own_directory = Path(os.path.abspath(context.directory))
    for split, each in own.items():
        digest = each.digest(include_pixels=config.digest_pixels)
        dataset = each.usable(own_directory / f"instances_{split}.json")
        if dataset.changes:
            context.console.print(f"data: {split} reads a copy of the annotation file: {', '.join(dataset.changes)}")
        num_checked += check_readable(dataset, named=each.dataset.annotation_file)
        described = dataclasses.asdict(dataset)
        del described["class_names"], described["category_ids"]
        for key in ("annotation_file", "image_dir"):
            path = described[key]
            described[key] = str(path.relative_to(own_directory) if path.is_relative_to(own_directory) else path)
        facts[split] = {**described, "digest": digest}
    gate = Gate(
        name="annotations and images are valid",
        value=num_checked,
        limit=None,
        passed=True,
        reason="every annotation was checked; value: number of images decoded",
    )
    return StageResult(facts=facts, gates=[gate])


def dataset_of(artifact: Artifact, split: str) -> CocoDataset:
    """The ``"train"`` or ``"validation"`` set of a data artifact.

    Raises:
        RecipeError: the run of a model that was trained elsewhere names no such set.
    """
    described = artifact.manifest.facts.get(split)
    if described is None:
        raise RecipeError(
            f"this needs images with labels and the run names none: give dataset.{split}=FILE, a COCO annotation file "
            f"with the classes of the model"
        )
    return read_coco(artifact.directory / described["annotation_file"], artifact.directory / described["image_dir"])


def train(context: StageContext) -> StageResult:
    """Train the student with its distiller; goes on from a checkpoint in the directory."""
    recipe = context.recipe
    if recipe.launch is None:
        result = train_recipe(recipe, context.inputs["data"], context.directory)
    else:
        from pipeline.launched_training import launch_training  # whose processes import this module

        result = launch_training(context)
    for intermediate in context.directory.glob("model_[0-9]*.pth"):
        intermediate.unlink()
    lines = (context.directory / METRICS_FILE).read_text().splitlines()
    loss = next((m["total_loss"] for m in map(json.loads, reversed(lines)) if "total_loss" in m), math.nan)
    gate = Gate(name="losses are finite", value=loss, limit=None, passed=math.isfinite(loss), reason="last total loss")
    facts = {
        **dataclasses.asdict(result),
        "distiller": distiller_name(recipe.section_json("distiller")),
        "launch": recipe.launch,
    }
    return StageResult(facts=facts, gates=[gate])


def train_recipe(recipe: Recipe, data_artifact: Artifact, directory: Path) -> TrainingResult:
    """Train in this process, or as one of those that torchrun started."""
    config = recipe.sections["training"]
    num_classes = len(data_artifact.manifest.facts["class_names"])
    _check_num_classes(recipe, num_classes)
    return train_student(
        build_student(recipe.model, num_classes, pretrained=True, seed=config.seed),
        recipe.sections["distiller"],
        config,
        train_set=dataset_of(data_artifact, "train"),
        validation_set=dataset_of(data_artifact, "validation"),
        output_directory=directory,
    )


def _check_num_classes(recipe: Recipe, num_classes: int) -> None:
    """The data set decides; a recipe that says something else means another data set."""
    named = class_owner(recipe.model)
    if named.num_classes not in (num_classes, NUM_CLASSES_UNSAID):
        key = "model.num_classes" if named is recipe.model else "model.roi_heads.num_classes"
        raise RecipeError(
            f"{key} is {named.num_classes} and the data set has {num_classes} classes; leave {key} out, it is taken "
            "from the data set, or name the data set that the recipe is for with dataset.train and dataset.validation"
        )


def student_of(context: StageContext) -> nn.Module:
    """A stock detector of the recipe, with random weights, for the data set's classes."""
    return build_student(context.recipe.model, len(context.inputs["data"].manifest.facts["class_names"]))


def strip(context: StageContext) -> StageResult:
    """Write the student checkpoint and prove that it is the student and nothing else."""
    student = student_of(context)
    export_config = context.recipe.sections["export"]
    loader = inference_loader(
        student,
        dataset_of(context.inputs["data"], "validation"),
        export_config.short_edge_pixels,
        export_config.max_edge_pixels,
    )
    proof = strip_checkpoint(
        context.inputs["train"].path(FINAL_CHECKPOINT),
        context.directory / STUDENT_CHECKPOINT,
        student=student,
        distiller=distilled_detector(student, context.recipe.sections["distiller"]).distiller,
        probe_inputs=[batch[0] for batch in itertools.islice(loader, NUM_PROBE_IMAGES)],
    )
    (context.directory / REMOVED_TENSORS_FILE).write_text(json.dumps(proof.removed_tensor_digests, indent=1))
    facts = dataclasses.asdict(proof)
    del facts["removed_tensor_digests"]
    gates = [
        Gate(
            name="student tensors identical", value=proof.tensors_identical, limit=True, passed=proof.tensors_identical
        ),
        Gate(name="keys are the stock detector's", value=proof.keys_are_stock, limit=True, passed=proof.keys_are_stock),
        Gate(
            name="teacher tensors in the student checkpoint",
            value=proof.num_teacher_tensors_in_student,
            limit=0,
            passed=proof.num_teacher_tensors_in_student == 0,
        ),
        Gate(
            name="output difference of stripped and unstripped",
            value=proof.max_abs_difference,
            limit=0.0,
            passed=proof.max_abs_difference == 0.0,
        ),
    ]
    return StageResult(facts=facts, gates=gates)
