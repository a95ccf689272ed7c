"""Whether LGD pays: baseline and LGD on the same data, schedule and seeds, and a sweep of LGD's own settings.

    python bench/distillation_gain.py [--recipe embedded] [--seeds 3] [--sweep] [--ablate] [section.key=value ...]
        [--write NAME]

Everything is trained by ``python -m pipeline compare``, so an interrupted call goes on where it stopped and a training
that another call has done is not repeated. Overrides hold for all trainings. ``--sweep`` adds one training (seed 0) for
each loss weight, and for each fraction of the training at which distillation begins, in the lists below. ``--ablate``
adds one with each of the recipe's deviations from the paper taken back, and one with all of them taken back.

Two questions are answered in so many words: is LGD ahead by more than the spread (the paired difference's 95 % interval
lies above 0), and is the implicit teacher at least 10 AP above its student.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from record import write_result  # noqa: E402
from rich.console import Console  # noqa: E402

from pipeline import recipe as recipes  # noqa: E402
from pipeline.compare import JSON_FILE, compare  # noqa: E402
from training.distillers import LgdConfig  # noqa: E402

LOSS_WEIGHTS = (0.3, 3.0)
DISTILL_FROM_FRACTIONS = (0.25, 0.75)
DEVIATIONS = ("residual", "soft_masks", "teacher_trains_head")
MIN_TEACHER_LEAD = 10.0


def main() -> None:
    arguments = _arguments()
    gain = compared(arguments, [f"{arguments.recipe},distiller=none", arguments.recipe], arguments.seeds)
    baseline, lgd = gain["rows"]
    result = {"overrides": arguments.overrides, "rows": [_row(baseline), _row(lgd)], "answers": answers(lgd)}
    for part, wanted, contenders in (
        ("sweep", arguments.sweep, variants(arguments)),
        ("ablation", arguments.ablate, ablations(arguments)),
    ):
        if wanted:
            found = compared(arguments, contenders, 1)
            result[part] = [_row(row) for row in found["rows"]]
    for row in result["rows"] + result.get("sweep", []) + result.get("ablation", []):
        print(_line(row))
    print(json.dumps(result["answers"], indent=1))
    if arguments.write:
        command = "python bench/distillation_gain.py " + " ".join(sys.argv[1:])
        print(f"written to {write_result(arguments.write, {**result, 'dataset': gain['dataset']}, command)}")


def compared(arguments: argparse.Namespace, contenders: list[str], num_seeds: int) -> dict[str, Any]:
    """The result of a comparison, as ``compare.json`` has it; all share one folder, and so their trainings."""
    runs, name = Path(arguments.runs), arguments.name
    compare([*contenders, *arguments.overrides], num_seeds=num_seeds, runs=runs, name=name, console=Console())
    result: dict[str, Any] = json.loads((runs / "compare" / name / JSON_FILE).read_text())
    return result


def variants(arguments: argparse.Namespace) -> list[str]:
    """The sweep's contenders: the recipe, and each setting changed alone; what the recipe has is not there twice."""
    recipe = recipes.load(arguments.recipe, arguments.overrides)
    max_iter, own = recipe.sections["training"].max_iter, recipe.sections["distiller"]
    begins = [round(fraction * max_iter) for fraction in DISTILL_FROM_FRACTIONS]
    return [
        arguments.recipe,
        *(f"{arguments.recipe},distiller.loss_weight={w}" for w in LOSS_WEIGHTS if w != own.loss_weight),
        *(f"{arguments.recipe},distiller.distill_from_iter={i}" for i in begins if i != own.distill_from_iter),
    ]


def ablations(arguments: argparse.Namespace) -> list[str]:
    """The recipe, it with each of its deviations from the paper taken back, and with all of them taken back."""
    used, paper = recipes.load(arguments.recipe, arguments.overrides).sections["distiller"], LgdConfig()
    back = [
        f"distiller.{name}={str(getattr(paper, name)).lower()}"
        for name in DEVIATIONS
        if getattr(used, name) != getattr(paper, name)
    ]
    return [arguments.recipe, *(f"{arguments.recipe},{change}" for change in back), ",".join([arguments.recipe, *back])]


def answers(lgd: dict[str, Any]) -> dict[str, Any]:
    """What the rows say about the two questions."""
    difference = lgd["difference_to_first"]
    lead = lgd["teacher_metrics"]["AP"]["mean"] - lgd["metrics"]["AP"]["mean"]
    return {
        "lgd_is_ahead_by_more_than_the_spread": difference["low"] is not None and difference["low"] > 0,
        "difference_AP": difference,
        "teacher_lead_AP": lead,
        "teacher_knows_more": lead >= MIN_TEACHER_LEAD,
    }


def _row(row: dict[str, Any]) -> dict[str, Any]:
    kept = ("label", "status", "num_finished", "difference_to_first", "seconds", "images_per_second")
    scores = {
        key: {name: row[key][name] for name in ("AP", "AP50") if name in row[key]}
        for key in ("metrics", "teacher_metrics")
    }
    return {**{key: row[key] for key in kept}, **scores}


def _line(row: dict[str, Any]) -> str:
    def of(key: str) -> str:
        found = row[key].get("AP")
        if found is None:
            return "-"
        return f"{found['mean']:.2f}" + (f" ± {found['deviation']:.2f}" if found["deviation"] is not None else "")

    difference = row["difference_to_first"]
    text = f"{row['label']:60s} AP {of('metrics'):14s} teacher {of('teacher_metrics'):14s}"
    if difference is None:
        return text
    interval = "" if difference["low"] is None else f" [{difference['low']:+.2f}, {difference['high']:+.2f}]"
    return f"{text} to the first {difference['mean']:+.2f}{interval}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="section.key=value, for all trainings")
    parser.add_argument("--recipe", default="embedded", help="a recipe's name or file that trains with LGD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--name", default="gain", help="of the comparison's folder")
    parser.add_argument("--write", metavar="NAME", help="keep the result in bench/results/NAME.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
