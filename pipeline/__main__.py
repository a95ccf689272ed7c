"""The command line: ``python -m pipeline COMMAND``; errors become one paragraph and an exit code."""

from __future__ import annotations

import dataclasses
import logging
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from rich.console import Console

from pipeline.errors import RecipeError, exit_code_of, message_of

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="From labelled images to a measured detector behind a Triton endpoint.",
)
console = Console(soft_wrap=True, highlight=False, markup=False)  # names may hold [brackets]

RUNS = Path("runs")
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of all runs.")]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Folder of this run inside it; default: the recipe's name.")
]
RecipeArgument = Annotated[str, typer.Argument(help="A recipe's name or file.")]
FolderOrRecipe = Annotated[str, typer.Argument(help="A folder that `export` wrote, or a recipe's name or file.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="Overrides, section.key=value.")]
BisectOption = Annotated[bool, typer.Option("--bisect", help="Name the first graph node that departs from detectron2.")]
LaunchOption = Annotated[
    str | None, typer.Option("--launch", help='Train in several processes: "torchrun --nproc-per-node=8".')
]


@app.command()
def run(
    recipe: RecipeArgument = "embedded",
    overrides: OverridesArgument = None,
    from_stage: Annotated[str | None, typer.Option("--from", help="Start at this stage.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Stop after this stage.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Rebuild although nothing changed.")] = False,
    launch: LaunchOption = None,
    runs: RunsOption = RUNS,
    name: NameOption = None,
) -> None:
    """Bring a recipe's run up to date: only stages whose inputs changed are rebuilt."""
    from pipeline import recipe as recipes
    from pipeline.environment import check_not_launched
    from pipeline.run import run_stages
    from pipeline.stages import after_run, stages_of
    from pipeline.status import up_to_date

    check_not_launched()
    options = _options(runs, name)
    loaded = dataclasses.replace(recipes.load(recipe, overrides or []), options=options, launch=launch or None)
    run_dir = _run_dir(loaded, runs, name)
    stages = stages_of(loaded)
    if force or not up_to_date(run_dir, stages, loaded):
        from pipeline.preflight import preflight

        preflight(loaded, serves=until in (None, "deploy", "benchmark", "report"))
    if loaded.folder is not None and overrides:
        recipes.save(loaded)  # the next command on the folder need not repeat them
    summary = run_stages(stages, loaded, run_dir, from_stage=from_stage, until=until, force=force, console=console)
    for line in after_run(run_dir, summary):
        console.print(line)


def _run_dir(recipe: Recipe, runs: Path, name: str | None) -> Path:
    return recipe.folder or runs / (name or recipe.name)


def _options(runs: Path, name: str | None) -> tuple[str, ...]:
    """The options that say where a run lies, for the commands that reproduce its artifacts."""
    return (*(("--runs", str(runs)) if runs != RUNS else ()), *(("--name", name) if name else ()))


@app.command()
def export(
    config: Annotated[str, typer.Option("--config", help="A yaml or LazyConfig file, or a name in the model zoo.")],
    weights: Annotated[Path, typer.Option("--weights", help="The detector's checkpoint, .pth, .pkl or .safetensors.")],
    out: Annotated[Path, typer.Option("--out", help="The run folder to write, runs/NAME.")],
    overrides: OverridesArgument = None,
    force: Annotated[bool, typer.Option("--force", help="Rebuild although nothing changed.")] = False,
) -> None:
    """Export a detectron2 model that was trained elsewhere into a run folder, for validate, deploy and benchmark."""
    from pipeline.own_model import export_own_model

    export_own_model(config, weights, overrides or [], out=out, force=force, console=console)


def _until(stage: str) -> None:
    """A command that runs a recipe, or what ``export`` wrote, as far as ``stage``."""

    def command(
        recipe: FolderOrRecipe,
        overrides: OverridesArgument = None,
        runs: RunsOption = RUNS,
        name: NameOption = None,
    ) -> None:
        run(recipe, overrides, until=stage, runs=runs, name=name)

    app.command(stage, help=f"Run the stages up to {stage}.")(command)


for _stage in ("deploy", "benchmark"):
    _until(_stage)


@app.command()
def validate(
    recipe: FolderOrRecipe,
    overrides: OverridesArgument = None,
    bisect: BisectOption = False,
    runs: RunsOption = RUNS,
    name: NameOption = None,
) -> None:
    """Run the stages up to validate."""
    if not bisect:
        return run(recipe, overrides, until="validate", runs=runs, name=name)
    from pipeline import recipe as recipes
    from pipeline.bisection import bisecting

    loaded = dataclasses.replace(recipes.load(recipe, overrides or []), options=_options(runs, name))
    with bisecting(loaded, _run_dir(loaded, runs, name), console):
        run(recipe, overrides, until="validate", runs=runs, name=name)


@app.command()
def status(
    recipe: Annotated[
        str | None, typer.Argument(help="Compare with this recipe; default: only what is on disk.")
    ] = None,
    overrides: OverridesArgument = None,
    runs: RunsOption = RUNS,
    name: NameOption = None,
) -> None:
    """Show how the stages of each run stand."""
    from pipeline import recipe as recipes
    from pipeline.stages import STAGES, stages_in
    from pipeline.status import status_table

    loaded = recipes.load(recipe, overrides or []) if recipe else None
    folders = (
        [_run_dir(loaded, runs, name) if loaded else runs / str(name)]
        if loaded or name
        else sorted(path for path in runs.glob("*") if path.is_dir() and path.name != "compare")
    )
    if not folders:
        console.print(f"no runs in {runs}; `python -m pipeline run embedded` makes one")
    for folder in folders:
        console.print(status_table(folder, stages_in(folder), loaded, every_stage=STAGES))


@app.command()
def report(
    recipe: RecipeArgument = "embedded",
    overrides: OverridesArgument = None,
    runs: RunsOption = RUNS,
    name: NameOption = None,
) -> None:
    """Write the report of a run anew from the artifacts that are there."""
    from pipeline import recipe as recipes
    from pipeline.errors import ArtifactError, GateFailed
    from pipeline.run import run_stages
    from pipeline.stages import report_paths, stages_of

    loaded = dataclasses.replace(recipes.load(recipe, overrides or []), options=_options(runs, name))
    run_dir, stages = _run_dir(loaded, runs, name), stages_of(loaded)
    if not any((run_dir / stage.name).is_dir() for stage in stages):
        raise ArtifactError(f"artifact missing: {run_dir} holds no artifact to report on; run the recipe first")
    try:
        run_stages(stages, loaded, run_dir, from_stage="report", force=True, console=console)
    except GateFailed as failure:
        console.print(message_of(failure))  # the report says so too; writing it succeeded
    for path in report_paths(run_dir):
        console.print(str(path))


@app.command()
def serve(
    runs: RunsOption = RUNS,
    name: Annotated[str, typer.Option("--name", help="The run whose model is served.")] = "embedded",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8002,
) -> None:
    """Serve a run's deployed model in the foreground until Ctrl-C."""
    from pipeline.serving_stages import serve_in_foreground
    from serving.servers import Ports

    serve_in_foreground(runs / name, Ports(grpc=grpc_port, http=http_port, metrics=metrics_port), console)


@app.command()
def detect(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    url: Annotated[str, typer.Option(help="host:port of the gRPC endpoint.")] = "localhost:8001",
    model: Annotated[str | None, typer.Option(help="Model name; default: the only one served.")] = None,
    min_score: Annotated[float, typer.Option(min=0.0, max=1.0, help="Leave out detections below.")] = 0.3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line an image.")] = False,
    draw: Annotated[Path | None, typer.Option(help="Write a picture with the boxes drawn.")] = None,
) -> None:
    """Send images to a server and show what it detects."""
    from pipeline.detect import detect_and_show

    detect_and_show(images, url=url, model=model, min_score=min_score, as_json=as_json, draw=draw, console=console)


@app.command()
def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE[,section.key=value…]… [section.key=value…]",
            help="Recipes, each a name or file with its own overrides after commas, and overrides for all of them.",
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Each recipe is trained with training.seed 0 to N-1.")] = 3,
    runs: RunsOption = RUNS,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Folder of the comparison in RUNS/compare; default: the first recipe's."),
    ] = None,
    launch: LaunchOption = None,
) -> None:
    """Train several recipes with the same seeds and put AP, time and memory into one table.

    For example: compare embedded,distiller=none embedded training.max_iter=2000 --seeds 3. Differences are to the
    recipe named first. What was trained before is not trained again; an interrupted comparison goes on.
    """
    from pipeline.compare import compare as compare_recipes

    code = compare_recipes(arguments, num_seeds=seeds, runs=runs, name=name, launch=launch or None, console=console)
    raise typer.Exit(code)


@app.command(hidden=True)
def compare_training(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    runs: RunsOption = RUNS,
    name: NameOption = None,
    launch: LaunchOption = None,
) -> None:
    """One training of a comparison, in a process of its own."""
    from pipeline import recipe as recipes
    from pipeline.comparison.trainings import train_in_process

    loaded = dataclasses.replace(recipes.load(recipe, overrides or []), options=_options(runs, name), launch=launch)
    train_in_process(loaded, runs / (name or loaded.name), console)


@app.command()
def student_from_reference(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of the LGD reference code.")],
    recipe: Annotated[str, typer.Argument(help="Name or file of the recipe of the same detector and backbone.")],
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option("--out", help="The student checkpoint to write.")] = Path("student.pth"),
) -> None:
    """Turn a checkpoint of the LGD reference code into a student checkpoint."""
    from pipeline.reference import convert_reference_checkpoint

    convert_reference_checkpoint(checkpoint, recipe, overrides or [], out=out, console=console)


def main() -> None:
    """Run the command; map errors to messages and exit codes (``pipeline.errors`` draws them)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for name in ("detectron2", "fvcore", "iopath", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Deprecations inside the pinned libraries; nothing a user can act on.
    warnings.filterwarnings("ignore")
    try:
        sys.exit(app(standalone_mode=False))
    except typer.Exit as ending:
        sys.exit(ending.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code_of(error)
        if code is None and isinstance(error, click.ClickException):  # a misspelt option
            error.show()
            sys.exit(RecipeError.exit_code)
        if code is None:
            traceback.print_exc()
            sys.exit(1)
        print(message_of(error), file=sys.stderr)  # noqa: T201
        sys.exit(code)


if __name__ == "__main__":
    main()
