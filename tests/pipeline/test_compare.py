"""Comparing recipes: the statistics, the plan and its refusals, and the tables."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.artifact import Manifest
from pipeline.compare import compare
from pipeline.comparison.paired import paired_difference, summary
from pipeline.comparison.plan import Plan, make_plan, split_at_commas
from pipeline.comparison.result import comparison_result
from pipeline.comparison.table import columns, markdown, terminal_table
from pipeline.comparison.trainings import Failure, Training
from pipeline.errors import RecipeError
from training.launch import LaunchError

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "tests" / "pipeline" / "tiny_recipe.py")
PLAIN = f"{TINY},distiller=none"


def plan_of(*arguments: str, num_seeds: int = 2, name: str | None = None) -> Plan:
    return make_plan(arguments, num_seeds=num_seeds, runs=Path("runs"), name=name)


# Statistics


def test_the_differences_are_paired_by_seed() -> None:
    found = paired_difference({0: 30.0, 1: 50.0, 2: 42.0, 7: 99.0}, {2: 41.0, 1: 47.0, 0: 28.0})
    assert found is not None
    # 2, 3 and 1: mean 2, deviation 1, half width 4.302653 / √3
    assert (found.mean, found.deviation, found.n) == (2.0, 1.0, 3)
    assert found.low == pytest.approx(2 - 2.484138, abs=1e-5)
    assert found.high == pytest.approx(2 + 2.484138, abs=1e-5)


def test_one_value_has_no_spread_and_none_has_no_mean() -> None:
    one = paired_difference({0: 3.0}, {0: 1.0, 1: 5.0})
    assert one is not None
    assert (one.mean, one.deviation, one.low, one.high, one.n) == (2.0, None, None, None, 1)
    assert paired_difference({0: 3.0}, {1: 1.0}) is None
    assert summary([]) is None
    spread = summary([1.0, 2.0, 4.0])
    assert spread is not None
    assert spread.deviation == pytest.approx(math.sqrt(7 / 3))


def test_the_interval_holds_the_true_difference_19_times_in_20() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        base = random.normal(40, 5, 3)
        values = base + random.normal(1.5, 0.7, 3)
        found = paired_difference(dict(enumerate(values)), dict(enumerate(base)))
        assert found is not None
        held += found.low <= 1.5 <= found.high  # type: ignore[operator]
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


# The plan


def test_an_argument_is_split_at_the_commas_between_its_overrides_alone() -> None:
    given = "embedded,distiller=none,export.canvas=[512,512],dataset.train='/a,b.json'"
    assert split_at_commas(given) == [
        "embedded",
        "distiller=none",
        "export.canvas=[512,512]",
        "dataset.train='/a,b.json'",
    ]


def test_overrides_for_all_come_first_and_a_recipes_own_win() -> None:
    plan = plan_of("training.max_iter=8", PLAIN, f"{TINY},training.max_iter=6")
    assert [c.label for c in plan.contenders] == ["tiny_recipe,distiller=none", "tiny_recipe,training.max_iter=6"]
    assert [c.recipe.sections["training"].max_iter for c in plan.contenders] == [8, 6]
    seeded = plan.contenders[1].seeded(5)
    assert (seeded.sections["training"].seed, seeded.sections["training"].max_iter) == (5, 6)
    assert plan.directory == Path("runs/compare/tiny_recipe")
    assert plan_of(TINY, name="mine").directory == Path("runs/compare/mine")


def test_seeds_are_trained_one_after_the_other_so_that_an_interrupted_comparison_has_pairs() -> None:
    order = [(contender.label, seed) for contender, seed in plan_of(TINY, PLAIN).trainings()]
    assert order == [
        ("tiny_recipe", 0), ("tiny_recipe,distiller=none", 0), ("tiny_recipe", 1), ("tiny_recipe,distiller=none", 1)
    ]  # fmt: skip


def test_a_folder_belongs_to_what_decides_the_training() -> None:
    folder = plan_of(TINY).contenders[0].folder
    assert plan_of(PLAIN, TINY, num_seeds=5).contenders[1].folder == folder
    assert plan_of(TINY, "benchmark.num_images=3").contenders[0].folder == folder
    assert plan_of(TINY, "training.max_iter=8").contenders[0].folder != folder
    assert plan_of(TINY, "dataset.num_train=13").data_dir != plan_of(TINY).data_dir


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "compare needs a recipe"),
        (["training.max_iter=8"], "compare needs a recipe"),
        ([TINY, f"{TINY},dataset.num_train=13"], "different data sets (dataset.num_train 12 and 13)"),
        ([TINY, "training.seed=3"], "compare sets training.seed itself"),
        ([f"{TINY},training.seed=3"], "compare sets training.seed itself"),
        ([TINY, f"{TINY},distiller=lgd", TINY], "train the same"),
        ([TINY, "training.evaluate_at=[0.5]"], "expected 1.0 among them"),
        ([f"{TINY},distilller=none"], "unknown section 'distilller', did you mean 'distiller'?"),
        (["embeded"], "did you mean 'embedded'?"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(arguments: list[str], told: str) -> None:
    with pytest.raises(RecipeError) as refused:
        plan_of(*arguments)
    assert told in str(refused.value)


def test_a_recipe_that_cannot_be_trained_is_refused_before_the_others_are(tmp_path: Path) -> None:
    arguments = [PLAIN, f"{TINY},distiller.distill_from_iter=4"]
    with pytest.raises(
        RecipeError, match=r"compare: tiny_recipe,distiller.distill_from_iter=4: .*would cover the whole"
    ):
        compare(arguments, num_seeds=1, runs=tmp_path, name=None, console=Console())
    with pytest.raises(LaunchError):
        compare([PLAIN], num_seeds=1, runs=tmp_path, name=None, console=Console(), launch="torchrun --nproc-per-node=3")
    assert not list(tmp_path.iterdir())


# The tables, of made-up trainings


def training_of(label: str, seed: int, *, failure: str = "", **facts: Any) -> Training:
    def manifest(stage: str, facts: dict[str, Any]) -> Manifest:
        return Manifest(
            stage=stage, stage_version=1, fingerprint=f"{label}{seed}", inputs={}, config={}, environment={},
            machine={"cpu": "a CPU", "num_cores": 2, "gpus": []},
            files={"student.pth": {"sha256": "5a", "size_bytes": 1}},
            facts=facts, gates=[], command="c", seconds=1.0, started="s", finished="f",
        )  # fmt: skip

    kept = {"part": "student", "num_parameters": 100, "size_bytes": 400}
    removed = [
        {"part": "a", "num_parameters": 20, "size_bytes": 80},
        {"part": "b", "num_parameters": 5, "size_bytes": 9},
    ]
    return Training(
        contender=label, seed=seed, run_dir=Path("runs") / label / f"seed-{seed}", command="python -m pipeline run",
        failure=Failure(reason=failure, exit_code=3) if failure else None,
        train=None if failure else manifest("train", facts),
        strip=None if failure else manifest("strip", {"kept": kept, "removed": removed}),
        peak_host_memory_bytes=1_000_000_000 + seed,
    )  # fmt: skip


def curve(**metrics: float) -> list[dict[str, float]]:
    return [{"iteration": 0, "fraction": 0.0, "AP": 0.0}, {"iteration": 4, "fraction": 1.0, **metrics}]


def result_of(trainings: list[Training], num_seeds: int = 3) -> dict[str, Any]:
    data = training_of("data", 0, train={"num_images": 12, "digest": "1"}, validation={"num_images": 10, "digest": "2"})
    assert data.train is not None
    return comparison_result(
        plan_of(PLAIN, TINY, num_seeds=num_seeds), trainings, data=data.train, machine={}, command="compare"
    )


@pytest.fixture
def result() -> dict[str, Any]:
    """Three seeds; the second of the distilled recipe diverged."""
    plain = [
        training_of(
            "tiny_recipe,distiller=none", seed, seconds=100.0, images_per_second=20.0,
            ap_curve=curve(AP=ap, AP50=60, mMR=50),
        )
        for seed, ap in enumerate((30.0, 34.0, 32.0))
    ]  # fmt: skip
    distilled = [
        training_of(
            "tiny_recipe", seed, seconds=180.0, images_per_second=10.0, ap_curve=curve(AP=ap, AP50=61, mMR=48),
            teacher_ap_curve=curve(AP=70 + seed, AP50=90),
        )
        for seed, ap in ((0, 31.0), (2, 35.0))
    ]  # fmt: skip
    return result_of([*plain, *distilled, training_of("tiny_recipe", 1, failure="training diverged")])


def test_a_row_has_mean_spread_and_difference_of_the_seeds_that_both_have(result: Any) -> None:
    first, second = result["rows"]
    assert first["metrics"]["AP"] == {"mean": 32.0, "deviation": 2.0, "n": 3}
    assert first["difference_to_first"] is None
    assert second["metrics"]["AP"]["mean"] == 33.0
    assert second["difference_to_first"]["n"] == 2
    assert second["difference_to_first"]["mean"] == 2.0  # 1 and 3; the unpaired seed would make it 1
    assert second["difference_to_first"]["high"] == pytest.approx(2 + 12.7062 * math.sqrt(2) / math.sqrt(2), abs=1e-3)
    assert second["teacher_metrics"]["AP"]["mean"] == 71.0
    assert first["teacher_metrics"] == {}
    assert (second["num_parameters_student"], second["num_parameters_dropped"]) == (100, 25)
    assert second["peak_host_memory_bytes"] == 1_000_000_002


def test_the_methods_share_of_a_step_is_against_the_same_recipe_without_it(result: Any) -> None:
    first, second = result["rows"]
    assert first["method"] is None
    # 2 images a batch: 0.1 s a step without, 0.2 s with the distiller; 4 iterations
    assert second["method"]["step_ratio"]["mean"] == pytest.approx(2.0)
    assert second["method"]["share"] == pytest.approx(0.5)
    assert second["method"]["seconds"] == pytest.approx(4 * 0.1)


def test_a_failed_training_is_in_its_row_and_in_words(result: Any) -> None:
    assert [row["status"] for row in result["rows"]] == ["finished", "incomplete"]
    page = markdown(result)
    assert "tiny_recipe, seed 1 failed: training diverged (see runs/tiny_recipe/seed-1)" in page
    assert "| tiny_recipe | 2 of 3 | 33.00 ± 2.83 | +2.00 [−10.71, +14.71], n 2 |" in page


def test_metrics_of_a_data_sets_own_get_a_column_and_a_direction(result: Any) -> None:
    shown = columns(result)
    assert "MR⁻² (lower is better)" in shown
    assert shown["MR⁻² (lower is better)"](result["rows"][1]) == "48.00 ± 0.00"


def test_the_tables_are_rectangular_and_say_the_same(result: Any) -> None:
    page = markdown(result)
    for block in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(result))
    shown = console.export_text()
    for text in ("33.00 ± 2.83", "+2.00 [−10.71, +14.71], n 2", "2.00×, 50 %", "1.0 GB"):
        assert text in shown
        assert text in page


def test_a_comparison_whose_trainings_all_failed_still_has_a_table() -> None:
    failed = [
        training_of(label, seed, failure="no | space")
        for label in ("tiny_recipe,distiller=none", "tiny_recipe")
        for seed in (0, 1)
    ]
    result = result_of(failed, num_seeds=2)
    assert [row["status"] for row in result["rows"]] == ["failed", "failed"]
    assert "0 of 2" in markdown(result)
