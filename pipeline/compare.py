"""``python -m pipeline compare``: train several recipes with the same seeds and put them into one table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipeline import environment
from pipeline.artifact import read_manifest
from pipeline.comparison.plan import DATA_STAGE, Plan, make_plan
from pipeline.comparison.result import comparison_result
from pipeline.comparison.table import failures, markdown, terminal_table
from pipeline.comparison.trainings import Training, done_training, prepare_data
from pipeline.errors import Interrupted, RecipeError
from pipeline.lock import locked
from pipeline.preflight import check_machine, check_schedule

JSON_FILE = "compare.json"
MARKDOWN_FILE = "compare.md"


def compare(
    arguments: Sequence[str],
    *,
    num_seeds: int,
    runs: Path,
    name: str | None,
    console: Console,
    launch: str | None = None,
) -> int:
    """Train every recipe with every seed, as far as that has not been done, and write the tables.

    Args:
        arguments, name, launch: see :func:`pipeline.comparison.plan.make_plan`.

    Returns:
        the exit code: 0, or that of the first training that failed; the others are trained and tabulated all the same.

    Raises:
        RecipeError: what is to be compared cannot be loaded, compared or trained.
        LaunchError, DeviceUnavailable, CompilerMissing, TrackerMissing: this machine cannot train it.
        RunLocked: another process works on this comparison.
        Interrupted: Ctrl-C; the training's process has ended and its checkpoints are kept.
        and whatever the data stage raises.
    """
    plan = make_plan(arguments, num_seeds=num_seeds, runs=runs, name=name, launch=launch)
    _check_trainable(plan)
    options = ["--runs", str(runs)] if runs != Path("runs") else []
    options += ["--name", name] if name else []
    options += ["--launch", launch] if launch else []
    command = shlex.join(["python", "-m", "pipeline", "compare", *arguments, "--seeds", str(num_seeds), *options])
    with locked(plan.directory, command):
        prepare_data(plan, console)
        trainings = _trainings(plan, console)
        result = comparison_result(
            plan,
            trainings,
            data=read_manifest(plan.data_dir / DATA_STAGE),
            machine=environment.facts(),
            command=command,
        )
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
        (plan.directory / JSON_FILE).write_text(text + "\n", encoding="utf-8")
        (plan.directory / MARKDOWN_FILE).write_text(markdown(result), encoding="utf-8")
    console.print(terminal_table(result))
    for sentence in failures(result):
        console.print(sentence)
    for file in (MARKDOWN_FILE, JSON_FILE):
        console.print(str(plan.directory / file))
    return next((training.failure.exit_code for training in trainings if training.failure), 0)


def _check_trainable(plan: Plan) -> None:
    """Refuse before the first training what would stop a later one."""
    for contender in plan.contenders:
        config = contender.recipe.sections["training"]
        try:
            check_schedule(contender.recipe.sections["distiller"].schedule(), config)
        except RecipeError as error:
            raise RecipeError(f"compare: {contender.label}: {error}") from error
        check_machine(config, contender.recipe.launch)


def _trainings(plan: Plan, console: Console) -> list[Training]:
    found: list[Training] = []
    planned = plan.trainings()
    try:
        for number, (contender, seed) in enumerate(planned, start=1):
            console.print(f"training {number} of {len(planned)}: {contender.label}, seed {seed}")
            training = done_training(plan, contender, seed, console)
            found.append(training)
            console.print(f"training {number} of {len(planned)}: {_outcome(training)}")
    except KeyboardInterrupt:
        raise Interrupted(
            f"{plan.directory}: stopped after {len(found)} of {len(planned)} trainings; the same command goes on "
            "from the last checkpoint"
        ) from None
    return found


def _outcome(training: Training) -> str:
    if training.failure:
        return f"failed: {training.failure.reason}"
    assert training.train is not None
    return f"AP {training.train.facts['ap_curve'][-1]['AP']:.2f} in {training.train.facts['seconds']:.0f} s"
