"""The train stage in several processes: the runner starts them with torchrun and waits; they only train.

The runner alone holds the run's lock and publishes the artifact. What a process is to do stands in a JSON file in the
run's folder, which all nodes have to see; what came of it, result or error, comes back beside it.

    python -m pipeline.launched_training JOB        one of the processes, started by torchrun
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NoReturn

from detectron2.utils import comm

from pipeline import recipe as recipes
from pipeline.artifact import open_artifact
from pipeline.errors import (
    NoSpaceLeft,
    TrainingProcessLost,
    exit_code_of,
    is_no_space,
    message_of,
    no_space_message,
)
from pipeline.stage import StageContext
from serving.servers import supervise
from training.launch import Launch, check_launch, parse_launch, process_group
from training.train import TrainingResult

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ".launched-training"
JOB_FILE, RESULT_FILE, ERROR_FILES = "job.json", "result.json", "error-{rank}.json"


def launch_training(context: StageContext) -> TrainingResult:
    """Train the recipe of ``context`` in the processes that its launch command starts.

    Raises:
        LaunchError: the command is none, or its processes do not fit batch or machine; nothing was started.
        TrainingProcessLost: a process was killed, or its node was lost.
        Whatever training raises in one of the processes.
    """
    recipe = context.recipe
    assert recipe.launch is not None
    launch = parse_launch(recipe.launch)
    check_launch(launch, recipe.sections["training"])
    folder = context.run_dir.resolve() / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    job = {
        "recipe": str(recipe.path),
        "overrides": recipe.overrides,
        "data": str(context.inputs["data"].directory.resolve()),
        "directory": str(context.directory.resolve()),
    }
    (folder / JOB_FILE).write_text(json.dumps(job))
    program = ["-m", "pipeline.launched_training", str(folder / JOB_FILE)]
    context.console.print(f"train: {launch.num_processes} processes, {launch.text}")
    if launch.num_nodes > 1 and Path(launch.command[0]) == Path(sys.executable):
        context.console.print(f"train: on each other node, its own --node-rank: {shlex.join(('torchrun', *program))}")
    try:
        code = _run(launch, [*launch.command, *program])
        if code != 0:
            _raise_reported(folder, launch, code)
        return TrainingResult(**json.loads((folder / RESULT_FILE).read_text()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(launch: Launch, command: list[str]) -> int:
    """Run the command to its end, and end it and all its processes when this one is stopped or killed."""
    search = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path)
    num_threads = str(max(1, len(os.sched_getaffinity(0)) // launch.processes_per_node))
    supervised = [sys.executable, "-I", "-S", supervise.__file__, str(os.getpid()), tempfile.mkdtemp(), "--", *command]
    quiet = {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # the libraries', from every process
    process = subprocess.Popen(
        supervised,
        env={"OMP_NUM_THREADS": num_threads, **quiet, **os.environ, "PYTHONPATH": search},
        start_new_session=True,  # Ctrl-C reaches the runner alone, which ends the processes in order
    )
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _raise_reported(folder: Path, launch: Launch, code: int) -> NoReturn:
    """Raise what the first process reported; the others were stopped because of it."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob(ERROR_FILES.format(rank="*")))]
    if not reports:
        raise TrainingProcessLost(
            f"launched training ended with code {code} and no process said why ({launch.text}). What they printed is "
            "above; a process that was killed often wanted more memory than there is: lower training.images_per_batch "
            "or raise training.accumulate_batches. The same command goes on from the last checkpoint"
        )
    first = min(reports, key=lambda report: report["rank"])
    module, _, name = first["type"].rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    error: Exception = kind.__new__(kind, first["message"])  # not kind(message): the message is whole already
    raise error


def main(job_file: Path) -> int:
    """One process of a launched training; returns its exit code."""
    supervise.die_with_parent(signal.SIGKILL)  # torchrun may be killed without a chance to end it
    rank = int(os.environ["RANK"])
    _quiet(rank)
    job = json.loads(job_file.read_text())
    try:
        recipe = recipes.load(job["recipe"], job["overrides"])
        from pipeline.training_stages import train_recipe  # which imports this module

        with process_group(recipe.sections["training"].device):
            result = train_recipe(recipe, open_artifact(Path(job["data"])), Path(job["directory"]))
            if comm.is_main_process():
                (job_file.parent / RESULT_FILE).write_text(json.dumps(dataclasses.asdict(result)))
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise  # a bug: its traceback is printed here
        _report(error, job_file.parent, rank)
        return code
    return 0


def _report(error: Exception, folder: Path, rank: int) -> None:
    if is_no_space(error):
        error = NoSpaceLeft(no_space_message(error, folder))
    kind = type(error)
    report = {"rank": rank, "type": f"{kind.__module__}.{kind.__qualname__}", "message": message_of(error)}
    with contextlib.suppress(OSError):  # on a full disk there is no room for it
        (folder / ERROR_FILES.format(rank=rank)).write_text(json.dumps(report))


def _quiet(rank: int) -> None:
    """One process tells how training goes."""
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stdout)
    for name in ("detectron2", "fvcore", "iopath", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
