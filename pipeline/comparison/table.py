"""``compare.json`` as a table for the terminal and as Markdown; both print only what the JSON says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.report.render import MISSING, cell, count, duration, number, percent, signed, size

Row = Mapping[str, Any]
WORDS = ("recipe", "machine", "command")  # columns of words; the others hold numbers


def columns(result: Mapping[str, Any]) -> dict[str, Callable[[Row], str]]:
    """The table's columns: heading -> text of a row's cell. A column that no row has a value for is left out."""
    seeds, confidence = result["num_seeds"], f"{100 * result['confidence']:.0f} %"
    found: dict[str, Callable[[Row], str]] = {
        "recipe": lambda row: str(row["label"]),
        "seeds": lambda row: str(seeds) if row["num_finished"] == seeds else f"{row['num_finished']} of {seeds}",
        "AP": lambda row: mean_and_spread(row["metrics"].get("AP")),
        f"Δ AP ({confidence} interval)": lambda row: difference(row["difference_to_first"]),
        "AP50": lambda row: mean_and_spread(row["metrics"].get("AP50")),
    }
    for metric in result["extra_metrics"]:
        found[metric["label"]] = functools.partial(_metric_text, metric["key"])
    found |= {
        "teacher AP": lambda row: mean_and_spread(row["teacher_metrics"].get("AP")),
        "training": lambda row: duration((row["seconds"] or {}).get("mean")),
        "step, method's share": lambda row: share(row["method"]),
        "images/s": lambda row: number((row["images_per_second"] or {}).get("mean"), 1),
        "peak memory": lambda row: peak(row),
        "dropped": lambda row: count(row["num_parameters_dropped"]),
    }
    fixed = list(found)[:5]
    return {
        name: text for name, text in found.items() if name in fixed or any(text(r) != MISSING for r in result["rows"])
    }


def _metric_text(key: str, row: Row) -> str:
    return mean_and_spread(row["metrics"].get(key))


def mean_and_spread(summary: Mapping[str, Any] | None) -> str:
    """``39.51 ± 0.40``; one value has no spread."""
    if summary is None:
        return MISSING
    mean = number(summary["mean"])
    return mean if summary["deviation"] is None else f"{mean} ± {number(summary['deviation'])}"


def difference(paired: Mapping[str, Any] | None) -> str:
    """``+1.20 [+0.30, +2.10], n 3``."""
    if paired is None:
        return MISSING
    interval = "" if paired["low"] is None else f" [{signed(paired['low'])}, {signed(paired['high'])}]"
    return f"{signed(paired['mean'])}{interval}, n {paired['n']}"


def share(method: Mapping[str, Any] | None) -> str:
    """``1.62×, 38 %``: a step's time over the baseline's, and the part of it that the method takes."""
    if method is None:
        return MISSING
    return f"{number(method['step_ratio']['mean'])}×, {percent(method['share'])}".replace("-", "−")


def peak(row: Row) -> str:
    """Of the GPU where there is one, else of the process."""
    gpu = row["peak_gpu_memory_bytes"]
    return f"{size(gpu)} GPU" if gpu else size(row["peak_host_memory_bytes"])


def terminal_table(result: Mapping[str, Any]) -> Table:
    """For a console: a column a recipe, since terminals are narrow."""
    (corner, label), *shown = columns(result).items()
    table = Table(title=f"{result['name']}: AP in per cent, mean ± deviation over seeds", title_justify="left")
    table.add_column(corner)
    for row in result["rows"]:
        table.add_column(Text(label(row)), justify="right", overflow="fold")
    for name, text in shown:
        table.add_row(Text(name), *(Text(text(row)) for row in result["rows"]))
    return table


def failures(result: Mapping[str, Any]) -> list[str]:
    """One sentence a failed training."""
    return [
        f"{t['contender']}, seed {t['seed']} failed: {t['failure']['reason']} (see {t['run']})"
        for t in result["trainings"]
        if t["failure"]
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """``compare.md``."""
    shown = columns(result)
    validation = result["dataset"]["validation"]
    lines = [f"# Comparison: {result['name']}", "", f"`{result['command']}`", ""]
    lines += [f"- {cell(sentence)}" for sentence in failures(result)]
    lines += [""] if failures(result) else []
    lines += _table(list(shown), [[text(row) for text in shown.values()] for row in result["rows"]])
    lines += ["", *_notes(result, validation), "", "## Each training", ""]
    heads = ["recipe", "seed", "AP", "AP50", "teacher AP", "training", "images/s", "peak memory", "machine", "command"]
    lines += _table(heads, [_training_cells(training) for training in result["trainings"]])
    return "\n".join(lines) + "\n"


def _notes(result: Mapping[str, Any], validation: Mapping[str, Any]) -> list[str]:
    notes = [
        "AP of the student at the end of training, ordinary evaluation on the validation split "
        f"({count(validation['num_images'])} images): mean ± sample standard deviation over seeds. Δ AP is the mean of "
        f"the differences to {result['first']} seed by seed, with Student's t interval "
        f"({100 * result['confidence']:.0f} %) and the number of pairs: with equal seeds, students start from the same "
        "weights and see the same images in the same order.",
        "Teacher AP is measured through the implicit teacher's features, with the labels of the validation images "
        "given: a sanity check that labels help, never a model that ships. Training time includes evaluations; the "
        "step's ratio and the method's share of it do not, and are against the same recipe without a distiller. Peak "
        "memory is the largest of the seeds; dropped is the number of parameters that strip leaves out.",
    ]
    if len(result["machines"]) > 1:
        notes.append("The trainings ran on different machines: compare their AP, not their times and memory.")
    return [line for note in notes for line in (note, "")][:-1]


def _training_cells(training: Mapping[str, Any]) -> list[str]:
    machine = training["machine"] or {}
    gpus = machine.get("gpus")
    where = f"{len(gpus)} GPU" if gpus else f"{machine.get('cpu')}, {machine.get('num_cores')} cores" if machine else ""
    metrics = "failed" if training["failure"] else number(training["metrics"].get("AP"))
    return [
        training["contender"],
        str(training["seed"]),
        metrics,
        number(training["metrics"].get("AP50")),
        number(training["teacher_metrics"].get("AP")),
        duration(training["seconds"]),
        number(training["images_per_second"], 1),
        peak(training),
        where or MISSING,
        f"`{training['command']}`",
    ]


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(cell(head) for head in heads) + " |",
        "".join("|---" if head in WORDS else "|--:" for head in heads) + "|",
        *("| " + " | ".join(cell(text) for text in row) + " |" for row in rows),
    ]
