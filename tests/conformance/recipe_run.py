"""One recipe from data to a stripped student on a generated data set, and what has to be true of the result.

The real stages run: data, train (two iterations, one before and one within distillation), strip. Only sizes and numbers
are overridden, so that a CPU takes seconds.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig
from detectron2.layers import FrozenBatchNorm2d
from rich.console import Console

from pipeline import recipe as recipes
from pipeline.preflight import preflight
from pipeline.recipe import Recipe
from pipeline.run import run_stages
from pipeline.stages import STAGES
from pipeline.training_stages import STUDENT_CHECKPOINT
from tests.conformance.generated_datasets import overrides_for
from training.checkpoint import load_student
from training.distillers import NoDistillerConfig
from training.student import build_student
from training.tracking import METRICS_FILE

SHORT_EDGE, CANVAS = 96, (128, 160)
TRAINING = (
    "training.init_checkpoint=null",
    "training.max_iter=2",
    "training.lr_decay_iters=[]",
    "training.learning_rate=1e-5",  # the recipe's own would take random weights where every score is exactly 0
    "training.images_per_batch=2",
    f"training.short_edge_pixels=[{SHORT_EDGE}]",
    f"training.max_edge_pixels={CANVAS[1]}",
    "training.num_workers=0",
    "training.device=cpu",
    "training.evaluate_at=[]",
    "training.checkpoint_period_iters=1",
    "training.log_period_iters=1",
)
DISTILLATION = ("distiller.distill_from_iter=1", "distiller.freeze_backbone_until_iter=1")
EXPORT = (
    f"export.canvas=[{CANVAS[0]},{CANVAS[1]}]",
    f"export.short_edge_pixels={SHORT_EDGE}",
    f"export.max_edge_pixels={CANVAS[1]}",
)
SCORE_THRESHOLDS = ("model.test_score_thresh", "model.roi_heads.box_predictor.test_score_thresh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeRun:
    """What a recipe's run left.

    Attributes:
        folder: holds what ``load_alone`` reads: the model's tree, the student checkpoint and probe images.
        detections: of the stripped student on the probe images, by field.
        losses: of each iteration, by name.
        proof: facts of the strip stage.
        num_parameters: of ``student`` and ``distiller``.
    """

    folder: Path
    detections: list[dict[str, torch.Tensor]]
    losses: list[dict[str, float]]
    proof: dict[str, Any]
    num_parameters: dict[str, int]


def small_recipe(name: str, folder: Path, *overrides: str) -> Recipe:
    """The recipe with its own model, on a generated data set of its own format, with the sizes and numbers above."""
    distillation = DISTILLATION if is_distilled(name, *overrides) else ()
    dataset_format = recipes.load(name).sections["dataset"].format
    # Two iterations leave every score near the prior: without a threshold below it there is nothing to compare.
    threshold = SCORE_THRESHOLDS["roi_heads" in recipes.load(name).model]
    own = [*overrides_for(dataset_format, folder), *TRAINING, *distillation, *EXPORT, f"{threshold}=0.0"]
    return recipes.load(name, [*own, *overrides])


def is_distilled(name: str, *overrides: str) -> bool:
    """Whether the recipe with these overrides trains with a distiller."""
    return not isinstance(recipes.load(name, overrides).sections["distiller"], NoDistillerConfig)


def run_recipe(recipe: Recipe, folder: Path) -> RecipeRun:
    """Data, train and strip under ``folder``; a failed gate raises."""
    recipe = _with_initial_weights(recipe, folder / "initial.pth")
    preflight(recipe)
    console = Console(file=io.StringIO())
    summary = run_stages(STAGES, recipe, folder / "run", console=console, until="strip")
    data, train, strip = (outcome.artifact for outcome in summary.outcomes)
    num_classes = len(data.manifest.facts["class_names"])

    alone = folder / "alone"
    alone.mkdir()
    tree = _with_classes(recipe.model, num_classes)
    LazyConfig.save(tree, str(alone / "model.yaml"))
    (alone / "student.pth").write_bytes(strip.path(STUDENT_CHECKPOINT).read_bytes())
    probes = [{"image": torch.randint(0, 255, (3, *size), dtype=torch.uint8)} for size in ((96, 128), (128, 96))]
    torch.save(probes, alone / "probe.pt")

    student = load_student(build_student(recipe.model, num_classes), alone / "student.pth")
    with torch.inference_mode():
        fields = [output["instances"].get_fields() for output in student.eval()(probes)]
    lines = [json.loads(line) for line in train.path(METRICS_FILE).read_text().splitlines()]
    return RecipeRun(
        folder=alone,
        detections=[{name: getattr(value, "tensor", value) for name, value in each.items()} for each in fields],
        losses=[{key: value for key, value in line.items() if "loss" in key} for line in lines if "total_loss" in line],
        proof=strip.manifest.facts,
        num_parameters=train.manifest.facts["num_parameters"],
    )


def check(run: RecipeRun, *, distilled: bool, masks: bool) -> None:
    """Raise ``AssertionError`` unless the run is what conformance means."""
    assert len(run.losses) == 2
    assert all(math.isfinite(value) for losses in run.losses for value in losses.values()), run.losses
    teacher_losses = {key for key in run.losses[0] if key.endswith(".tea")}
    own_losses = {key for key in run.losses[0] if not key.endswith(".tea")} - {"total_loss", "loss_distill"}
    assert own_losses
    assert teacher_losses == ({f"{key}.tea" for key in own_losses} if distilled else set())
    assert ("loss_distill" in run.losses[0]) is distilled

    assert run.proof["keys_are_stock"]
    assert run.proof["tensors_identical"]
    assert run.proof["num_teacher_tensors_in_student"] == 0
    assert run.proof["max_abs_difference"] == 0.0
    assert run.proof["num_probe_images"] > 0
    assert bool(run.num_parameters["distiller"]) is distilled

    assert sum(len(fields["scores"]) for fields in run.detections) > 0, "nothing was compared"
    assert all(torch.isfinite(fields["pred_boxes"]).all() for fields in run.detections)
    assert all(("pred_masks" in fields) is masks for fields in run.detections)


def check_alone(run: RecipeRun, modules: list[str]) -> None:
    """Raise ``AssertionError`` unless the model of ``load_alone`` is the student, built without the distillers.

    Args:
        modules: this project's modules that were loaded there.
    """
    allowed = ("training.detectors", "training.backbones")
    assert all(name == "training" or name.startswith(allowed) for name in modules), modules
    found = torch.load(run.folder / "detections.pt", weights_only=False)
    assert len(found) == len(run.detections)
    for here, there in zip(run.detections, found, strict=True):
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)


def _with_initial_weights(recipe: Recipe, file: Path) -> Recipe:
    """The recipe with random weights in place of those it names, where frozen norms need statistics that fit them.

    Without, activations grow from block to block until every score is 0 and no detection is left to compare.
    """
    student = build_student(recipe.model, 1, seed=0).eval()
    frozen = [module for module in student.modules() if isinstance(module, FrozenBatchNorm2d)]
    if not frozen:
        return recipe
    handles = [module.register_forward_pre_hook(_take_statistics) for module in frozen]
    pixels = torch.randint(0, 255, (1, 3, *CANVAS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        student.backbone((pixels - student.pixel_mean) / student.pixel_std)
    for handle in handles:
        handle.remove()
    bottom_up = {key: tensor for key, tensor in student.state_dict().items() if key.startswith("backbone.bottom_up.")}
    torch.save({"model": bottom_up}, file)
    training = dataclasses.replace(recipe.sections["training"], init_checkpoint=str(file))
    return dataclasses.replace(
        recipe,
        sections={**recipe.sections, "training": training},
        resolved={**recipe.resolved, "training": {**recipe.resolved["training"], "init_checkpoint": str(file)}},
    )


def _take_statistics(norm: FrozenBatchNorm2d, inputs: tuple[torch.Tensor, ...]) -> None:
    norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
    norm.running_var.copy_(inputs[0].var(dim=(0, 2, 3)) + norm.eps)


def _with_classes(model: Any, num_classes: int) -> Any:
    """The tree with the data set's number of classes and without pretrained weights."""
    tree = copy.deepcopy(model)
    (tree if "num_classes" in tree else tree.roi_heads).num_classes = num_classes
    if "weights" in tree.backbone.get("bottom_up", tree.backbone):
        tree.backbone.bottom_up.weights = None
    return tree
