"""The report's charts: matplotlib SVG, inlined, whose colours are the page's CSS variables.

A chart cannot know whether it will be read on light or dark paper. So each colour drawn here is a placeholder that the
SVG's text replaces by ``var(--name)``; the style sheet then gives it a value for each scheme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK, MUTED, GRID, PAPER = "#000001", "#000002", "#000003", "#000004"
STATUS = {"passed": "#000005", "failed": "#000006", "not run": "#000007"}
SERIES = [f"#00001{index}" for index in range(8)]
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "paper"}
_VARIABLES |= {colour: word.replace(" ", "-") for word, colour in STATUS.items()}
_VARIABLES |= {colour: f"series-{index}" for index, colour in enumerate(SERIES)}

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: selectable, in the page's font, small
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
BREAKDOWN = (
    ("client_ms", "client", SERIES[6]),
    ("queue_ms", "queue", SERIES[1]),
    ("compute_input_ms", "compute input", SERIES[2]),
    ("compute_infer_ms", "compute infer", SERIES[0]),
    ("compute_output_ms", "compute output", SERIES[3]),
)
OUTLIER_RATIO = 10.0  # between the slowest and the fastest point of a latency chart
# Column and row of each stage in the lineage graph.
_PLACES = {
    "data": (0, 0),
    "train": (1, 0),
    "strip": (2, 0),
    "export": (3, 0),
    "precision": (3.5, -1),
    "engine": (4.5, -1),
    "validate": (5, 0),
    "deploy": (6, 0),
    "benchmark": (7, 0),
}


def charts(report: Mapping[str, Any]) -> dict[str, str]:
    """The SVG of each chart; empty text where the report has no numbers for it."""
    latency, training = report["latency"], report["distillation"]
    drawn = dict.fromkeys(("ap_curve", "losses", "latency", "breakdown", "open_loop", "per_class"), "")
    drawn["lineage"] = _svg("lineage", (8.6, 1.9), _lineage, report["lineage"])
    if training["ap_curve"]:
        drawn["ap_curve"] = _svg("ap", (4.8, 2.7), _ap_curve, report)
    if training["losses"]:
        drawn["losses"] = _svg("loss", (4.8, 2.7), _losses, training["losses"])
    if any(row["throughput"] is not None for row in latency["closed_loop"]):
        drawn["latency"] = _svg("latency", (4.8, 3.0), _latency_throughput, latency)
        drawn["breakdown"] = _svg("breakdown", (4.8, 3.0), _breakdown, latency["closed_loop"])
    if any(row["request_rate"] is not None for row in latency["open_loop"]):
        drawn["open_loop"] = _svg("open", (4.8, 2.7), _open_loop, latency)
    if any(row["delta"] for row in report["per_class"]["rows"]):  # bars of length zero show nothing
        drawn["per_class"] = _svg("classes", (4.8, 2.9), _per_class, report["per_class"]["rows"])
    return drawn


def _svg(name: str, inches: tuple[float, float], draw: Callable[..., None], values: Any) -> str:
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=inches, layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)
        draw(axes, values)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Many SVGs share one page, and an id may occur once in it.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"(\d(?:\.\d+)?px) '?DejaVu Sans'?[^;\"]*", r"\1 var(--sans)", text)
    text = re.sub(r"#0000\d\d", lambda found: f"var(--{_VARIABLES[found.group()]})", text)
    return re.sub(
        r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="([^"]*)pt"', r'<svg aria-hidden="true" \1\2', text, count=1
    )


def _legend(axes: Axes, columns: int = 4) -> None:
    """Above the axes, where no line can run through it."""
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, fontsize=8, handlelength=1.2, columnspacing=1.2
    )


def _plain_log(axes: Axes) -> None:
    """A logarithmic y axis labelled 1, 2, 5, 10, not in powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _latency_axis(axes: Axes, milliseconds: Sequence[float]) -> None:
    """From zero, or logarithmic where one slow point would press all others onto the axis."""
    axes.set(ylabel="latency (ms)")
    if min(milliseconds, default=0.0) > 0 and max(milliseconds) > OUTLIER_RATIO * min(milliseconds):
        _plain_log(axes)
        axes.set_ylabel("latency (ms, logarithmic)")
    else:
        axes.set_ylim(0, None)


def _ap_curve(axes: Axes, report: Mapping[str, Any]) -> None:
    """Student in full lines; baseline and implicit teacher beside it where they were measured."""
    curve = report["distillation"]["ap_curve"]
    others = {row["who"]: row["curve"] for row in report["teacher_panel"]["rows"] if row["who"] != "student"}
    lines = [("AP, student", curve, "AP", "-"), ("AP50, student", curve, "AP50", "-")]
    lines += [(f"AP, {who.partition(' (')[0]}", points, "AP", "--") for who, points in others.items()]
    for index, (label, evaluations, metric, style) in enumerate(lines):
        points = [(100 * point["fraction"], point[metric]) for point in evaluations if point[metric] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=SERIES[index], linestyle=style, label=label)
    axes.set(xlabel="training (%)", ylabel="AP on validation (%)", ylim=(0, None))
    _legend(axes, columns=2)


def _losses(axes: Axes, losses: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    for index, (name, points) in enumerate(losses.items()):
        total = name == "total_loss"
        axes.plot(
            [point["iteration"] for point in points],
            [point["value"] for point in points],
            color=INK if total else SERIES[index % len(SERIES)],
            linestyle="-" if index < len(SERIES) else "--",
            linewidth=1.8 if total else 1.2,
            label=name,
        )
    if all(point["value"] > 0 for points in losses.values() for point in points):
        _plain_log(axes)  # the terms differ by orders of magnitude
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set(xlabel="iteration", ylabel="loss (logarithmic)" if axes.get_yscale() == "log" else "loss")
    _legend(axes)


def _latency_throughput(axes: Axes, latency: Mapping[str, Any]) -> None:
    rows = [row for row in latency["closed_loop"] if row["throughput"] is not None]
    for index, percentile in enumerate(("p50_ms", "p99_ms")):
        points = [(row["throughput"], row[percentile]) for row in rows if row[percentile] is not None]
        if points:
            label = f"{percentile.removesuffix('_ms')}, closed loop"
            axes.plot(*zip(*points, strict=True), marker="o", color=SERIES[index], label=label)
    for row in rows:
        if row["p99_ms"] is not None:
            place = (row["throughput"], row["p99_ms"])
            axes.annotate(
                f"{row['concurrency']}", place, (0, 5), textcoords="offset points", ha="center", color=MUTED, fontsize=8
            )
    alone = latency["in_process"]
    if alone and alone["throughput"] is not None and alone["p50_ms"] is not None:
        axes.plot(
            alone["throughput"], alone["p50_ms"], marker="D", linestyle="", color=SERIES[2], label="p50, in process"
        )
    _objective(axes, latency)
    axes.margins(y=0.12)
    seen = [row[percentile] for row in rows for percentile in ("p50_ms", "p99_ms") if row[percentile] is not None]
    _latency_axis(axes, seen + ([alone["p50_ms"]] if alone and alone["p50_ms"] is not None else []))
    axes.set(xlabel="throughput (images/s)")
    _legend(axes, columns=2)


def _objective(axes: Axes, latency: Mapping[str, Any]) -> None:
    limit = latency["objective"].get("max_p99_ms")
    if isinstance(limit, int | float):
        axes.axhline(
            limit, color=STATUS["failed"], linestyle=(0, (5, 3)), linewidth=1.1, label=f"objective: p99 ≤ {limit:g} ms"
        )


def _open_loop(axes: Axes, latency: Mapping[str, Any]) -> None:
    for index, percentile in enumerate(("p50_ms", "p99_ms")):
        points = [(row["request_rate"], row[percentile]) for row in latency["open_loop"] if row[percentile] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=SERIES[index], label=percentile.removesuffix("_ms"))
    _objective(axes, latency)
    rows = latency["open_loop"]
    _latency_axis(axes, [row[key] for row in rows for key in ("p50_ms", "p99_ms") if row[key] is not None])
    axes.set(xlabel="request rate (images/s)")
    _legend(axes)


def _breakdown(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    names = [str(row["concurrency"]) for row in rows]
    left = [0.0] * len(rows)
    for key, label, colour in BREAKDOWN:
        widths = [row[key] or 0.0 for row in rows]
        axes.barh(names, widths, left=left, height=0.62, color=colour, label=label, edgecolor=PAPER, linewidth=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="mean time in a request (ms)", ylabel="concurrency")
    _legend(axes, columns=3)


def _per_class(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    worst = [row for row in rows if row["delta"] is not None][:10]
    names = [str(row["name"]) for row in worst]
    colours = [STATUS["failed"] if row["delta"] < 0 else SERIES[0] for row in worst]
    axes.barh(names, [row["delta"] for row in worst], height=0.62, color=colours)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="AP − reference AP (points)")


def _lineage(axes: Axes, stages: Sequence[Mapping[str, Any]]) -> None:
    width, height = 0.84, 0.62
    for stage in stages:
        x, y = _PLACES[stage["stage"]]
        for source in stage["reads"]:
            _arrow(axes, _PLACES[source], (x, y), width, height)
        colour = STATUS[stage["status"]]
        box = FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=PAPER,
            edgecolor=colour,
            linewidth=1.2,
            linestyle="--" if stage["status"] == "not run" else "-",
        )
        axes.add_patch(box)
        axes.text(x, y + 0.15, stage["stage"], ha="center", va="center", fontsize=9, fontweight="bold")
        below = (stage["fingerprint"] or "").removeprefix("sha256:")[:8] or "–"
        axes.text(x, y - 0.03, below, ha="center", va="center", fontsize=7, color=MUTED)
        seconds = stage["seconds"]
        time = "" if seconds is None else f"{seconds:.0f} s · " if seconds < 120 else f"{seconds / 60:.0f} min · "
        axes.text(x, y - 0.2, time + stage["status"], ha="center", va="center", fontsize=7, color=colour)
    axes.set(xlim=(-0.5, 7.5), ylim=(-1.4, 0.85))
    axes.axis("off")


def _arrow(axes: Axes, source: tuple[float, float], target: tuple[float, float], width: float, height: float) -> None:
    """An arrow between two boxes: straight to a neighbour, else curved around those in between."""
    (x0, y0), (x1, y1) = source, target
    if y0 != y1:
        start, end, bend = (x0, y0 - height / 2), (x1 - width / 2, y1), 0.35
        if y0 < y1:
            start, end = (x0 + width / 2, y0), (x1, y1 - height / 2)
    elif x1 - x0 > 1:
        start, end, bend = (x0, y0 + height / 2), (x1, y1 + height / 2), -0.16
    else:
        start, end, bend = (x0 + width / 2, y0), (x1 - width / 2, y1), 0.0
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=7,
            color=MUTED,
            linewidth=0.8,
            shrinkA=1,
            shrinkB=1,
        )
    )
