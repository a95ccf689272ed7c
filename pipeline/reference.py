"""The command that turns a checkpoint of the LGD reference code into a student checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline import recipe as recipes
from pipeline.errors import RecipeError


def convert_reference_checkpoint(
    checkpoint: Path, recipe: str, overrides: Sequence[str], *, out: Path, console: Console
) -> None:
    """Write the student checkpoint and show what was kept and what was dropped.

    Raises:
        RecipeError: the recipe is wrong, or ``out`` is the checkpoint itself or a folder.
        WeightsUnusable: the checkpoint is not one of the recipe's detector.
    """
    from training.reference_checkpoint import student_from_reference
    from training.student import build_student

    loaded = recipes.load(recipe, overrides)
    if out.is_dir() or out.resolve() == checkpoint.resolve():
        raise RecipeError(f"--out {out} is {'a folder' if out.is_dir() else 'the checkpoint itself'}; give a new file")
    student = student_from_reference(
        checkpoint, out, build=lambda num_classes: build_student(loaded.model, num_classes)
    )
    table = Table("", "part", "tensors", "parameters", title=f"{checkpoint} -> {out}", title_justify="left")
    for what, groups in (("kept", student.kept), ("dropped", student.dropped)):
        for group in groups:
            table.add_row(what, group.part, str(group.num_tensors), f"{group.num_parameters:,}")
    console.print(table)
    console.print(
        f"{student.num_classes} classes; training.init_checkpoint={out} starts a training from it, and "
        "training.checkpoint.load_student loads it into the recipe's model"
    )
