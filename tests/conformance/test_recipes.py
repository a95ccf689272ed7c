"""Every recipe trains, strips, and leaves a student that loads where nothing of this project's distillers is.

``make conformance`` runs each recipe at its full size of model (about twelve minutes and 6 GB on two cores).
``make test`` runs one of each detector and data set, and a baseline, on a smaller network.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.recipe import available
from tests.conformance.recipe_run import RecipeRun, check, check_alone, is_distilled, run_recipe, small_recipe
from tests.conformance.shrunk import shrink

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "retinanet_r50_voc",
    "fcos_r50_2x",
    "detectron2_fcos_r50_1x",
    "atss_r50_1x_single_scale",
    "gfl_r18_1x_single_scale",
    "faster_rcnn_r50_crowdhuman",
    "mask_rcnn_r50_1x",
)
LoadAlone = Callable[[RecipeRun], list[str]]


@pytest.fixture(scope="module")
def load_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadAlone]:
    """Lets a process of its own load a run's student; returns this project's modules that it has loaded by then."""
    errors = tmp_path_factory.mktemp("load_alone") / "errors.txt"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.conformance.load_alone"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    def load(run: RecipeRun) -> list[str]:
        process.stdin.write(f"{run.folder}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the student does not load:\n{errors.read_text()}"
        return json.loads(answer)

    yield load
    process.stdin.close()
    process.wait(timeout=30)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RecipeRun]:
    """Runs a recipe on a small network, once."""

    @functools.cache
    def run(name: str, *overrides: str) -> RecipeRun:
        folder = tmp_path_factory.mktemp(name)
        recipe = small_recipe(name, folder, *overrides)
        shrink(recipe)
        return run_recipe(recipe, folder)

    return run


@pytest.mark.parametrize("name", SMALL)
def test_a_small_one_of_each_family_trains_strips_and_loads_alone(
    name: str, trained: Callable[..., RecipeRun], load_alone: LoadAlone
) -> None:
    run = trained(name)
    check(run, distilled=is_distilled(name), masks=name.startswith("mask"))
    check_alone(run, load_alone(run))


@pytest.mark.parametrize("name", [name for name in SMALL if name.split("_")[0] in ("retinanet", "faster", "mask")])
def test_a_student_of_detectron2s_own_parts_needs_no_module_of_this_project(
    name: str, trained: Callable[..., RecipeRun]
) -> None:
    assert "training." not in (trained(name).folder / "model.yaml").read_text()


def test_the_baseline_of_a_recipe_trains_and_has_nothing_to_strip(trained: Callable[..., RecipeRun]) -> None:
    # This recipe's implicit teacher has an optimizer of its own, which then has nothing to do.
    check(trained("mask_rcnn_swin_t_3x", "distiller=none"), distilled=False, masks=True)


def test_a_student_that_differs_in_one_score_or_needs_a_distiller_is_found(
    trained: Callable[..., RecipeRun], load_alone: LoadAlone
) -> None:
    run = trained("retinanet_r50_voc")
    modules = load_alone(run)
    detections = copy.deepcopy(run.detections)
    detections[0]["scores"][0] += 1e-6
    with pytest.raises(AssertionError):
        check_alone(dataclasses.replace(run, detections=detections), modules)
    with pytest.raises(AssertionError):
        check_alone(run, [*modules, "training.distillers"])


@pytest.mark.conformance
@pytest.mark.slow
@pytest.mark.parametrize("name", available())
def test_every_recipe_trains_strips_and_loads_alone(
    name: str, tmp_path: Path, load_alone: LoadAlone, record_property: Callable[[str, object], None]
) -> None:
    recipe = small_recipe(name, tmp_path)
    run = run_recipe(recipe, tmp_path)
    record_property("num_parameters", json.dumps(run.num_parameters))
    record_property("total_losses", json.dumps([losses["total_loss"] for losses in run.losses]))
    record_property("num_detections", sum(len(fields["scores"]) for fields in run.detections))
    record_property("num_tensors", run.proof["num_tensors"])
    check(run, distilled=is_distilled(name), masks=name.startswith("mask"))
    check_alone(run, load_alone(run))
