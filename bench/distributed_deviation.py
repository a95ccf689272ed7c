"""How far training in several processes ends from training in one, with the same images in every iteration.

    python bench/distributed_deviation.py [--processes 2] [--iters 60] [--recipe embedded] [KEY=VALUE ...] [--write]

Processes share the images of an iteration out, so gradients are of the same global batch. What differs with default
settings: RetinaNet and detectron2's FCOS divide their losses by a running number of positive anchors that every process
keeps for itself, each process pads its images to its own largest one, and a BatchNorm that is not frozen sees its
process's images alone. Three trainings from the same weights: one process, several, and one process with another seed
(other order and augmentation, same weights) for comparison. All distances are relative to how far the first training
moved from the weights that all start from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
from record import write_result  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import Tensor  # noqa: E402

from pipeline import recipe as recipes  # noqa: E402
from pipeline.run import run_stages  # noqa: E402
from pipeline.stages import STAGES  # noqa: E402
from training.checkpoint import FINAL_CHECKPOINT, read_checkpoint  # noqa: E402
from training.student import build_student  # noqa: E402
from training.tracking import METRICS_FILE  # noqa: E402


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(arguments, Path(folder))
    print(json.dumps(rows, indent=1))
    if arguments.write:
        command = "python bench/distributed_deviation.py " + " ".join(sys.argv[1:])
        print(f"written to {write_result('distributed_deviation', rows, command)}")


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train three times and measure what is between the results."""
    common = [
        f"training.max_iter={arguments.iters}", "training.log_period_iters=1", "training.evaluate_at=[1.0]",
        f"training.checkpoint_period_iters={arguments.iters}", "training.num_workers=0", *arguments.overrides,
    ]  # fmt: skip
    start = folder / "start.pth"
    recipe = recipes.load(arguments.recipe, common)
    num_classes = _num_classes(recipe, folder)
    student = build_student(recipe.model, num_classes, pretrained=True, seed=0)
    torch.save({"model": student.state_dict()}, start)
    common.append(f"training.init_checkpoint={start}")
    launch = f"torchrun --nproc-per-node={arguments.processes}"
    one = trained(folder / "one", arguments.recipe, [*common, "training.seed=0"], None)
    several = trained(folder / "several", arguments.recipe, [*common, "training.seed=0"], launch)
    other = trained(folder / "other", arguments.recipe, [*common, "training.seed=1"], None)
    begin = student.state_dict()
    return {
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "iterations": arguments.iters,
        "processes": arguments.processes,
        "several_processes": between(begin, one, several),
        "another_seed": between(begin, one, other),
    }


def trained(run_dir: Path, recipe: str, overrides: list[str], launch: str | None) -> dict[str, Any]:
    """Weights, losses and AP that a training ends with."""
    loaded = dataclasses.replace(recipes.load(recipe, overrides), launch=launch)
    run_stages(STAGES, loaded, run_dir, until="train", console=Console(stderr=True, soft_wrap=True))
    lines = [json.loads(line) for line in (run_dir / "train" / METRICS_FILE).read_text().splitlines()]
    return {
        "weights": read_checkpoint(run_dir / "train" / FINAL_CHECKPOINT)["model"],
        "losses": [{key: value for key, value in line.items() if "loss" in key} for line in lines],
        "AP": next(line["AP"] for line in reversed(lines) if "AP" in line),
    }


def between(begin: dict[str, Tensor], one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Distance of the weights and relative difference of the losses, early and late."""
    moved = _distance(begin, one["weights"])
    totals = [[step["total_loss"] for step in of["losses"]] for of in (one, two)]
    relative = [abs(b / a - 1) for a, b in zip(*totals, strict=True)]
    third = max(1, len(relative) // 3)
    return {
        "weight_distance_relative_to_movement": _distance(one["weights"], two["weights"]) / moved,
        "mean_relative_loss_difference_first_third": sum(relative[:third]) / third,
        "mean_relative_loss_difference_last_third": sum(relative[-third:]) / third,
        "total_loss_of_last_third": [sum(values[-third:]) / third for values in totals],
        "AP": [one["AP"], two["AP"]],
    }


def _distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    names = [name for name, value in first.items() if value.is_floating_point() and "running_" not in name]
    squares = [(first[name].double() - second[name].double()).square().sum() for name in names]
    return float(torch.stack(squares).sum().sqrt())


def _num_classes(recipe: recipes.Recipe, folder: Path) -> int:
    summary = run_stages(STAGES, recipe, folder / "data", until="data", console=Console(quiet=True))
    return len(summary.outcomes[0].artifact.manifest.facts["class_names"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe")
    parser.add_argument("--recipe", default="embedded")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--iters", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
