"""``report.json`` → ``report.md`` and a single-file ``report.html``; both print only what the JSON says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from pipeline.report.build import value_text
from pipeline.report.charts import charts

TEMPLATES = Path(__file__).parent / "templates"
MISSING = "–"
COMMAND_WIDTH = 110


def write_report(report: Mapping[str, Any], directory: Path) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html`` into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")
    # Drawn from what was written, so that nothing can be shown that the JSON does not hold.
    report = json.loads(text)
    templates = _environment()
    markdown = templates.get_template("report.md").render(report=report)
    (directory / "report.md").write_text(markdown, encoding="utf-8")
    # The drawings are this module's own markup, and autoescape must not touch it.
    drawings = {name: markupsafe.Markup(svg) for name, svg in charts(report).items()}
    style = markupsafe.Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    page = templates.get_template("report.html").render(report=report, charts=drawings, style=style)
    (directory / "report.html").write_text(page, encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,  # a misspelt name in a template is a bug, not an empty cell
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "num": number,
        "signed": signed,
        "size": size,
        "count": count,
        "duration": duration,
        "percent": percent,
        "short": short_digest,
        "text": text_of,
        "cell": cell,
        "words": words,
        "fact": lambda value, key: fact(key, value),
        "moment": moment,
        "capability": capability,
        "shell_lines": shell_lines,
    }
    return environment


def number(value: object, digits: int = 2) -> str:
    """A measured number with fixed digits; words (*not run*) as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISSING if value is None else str(value)
    return f"{value:.{digits}f}"


def signed(value: object, digits: int = 2) -> str:
    """A difference, with a real minus sign and an explicit plus."""
    if not isinstance(value, int | float):
        return MISSING
    rounded = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(rounded) == 0 else rounded.replace("-", "−")


def size(value: object) -> str:
    """Bytes for reading."""
    if not isinstance(value, int | float):
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f} B"


def count(value: object) -> str:
    """A whole number with a thin space between thousands."""
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else MISSING if value is None else str(value)


def duration(value: object) -> str:
    """Seconds for reading."""
    if not isinstance(value, int | float):
        return MISSING
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(value: object, digits: int = 0) -> str:
    """A share in [0, 1] as per cent."""
    return f"{100 * value:.{digits}f} %" if isinstance(value, int | float) else MISSING


def short_digest(value: object) -> str:
    """The first 12 characters of a digest."""
    return str(value).removeprefix("sha256:")[:12] if value else MISSING


def text_of(value: object) -> str:
    """Any fact as words."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(text_of(item) for item in value) or MISSING
    if isinstance(value, Mapping):
        return ", ".join(f"{words(key)} {fact(key, item)}" for key, item in value.items()) or MISSING
    return count(value) if isinstance(value, int) else value_text(value)


def fact(key: object, value: object) -> str:
    """A fact's value as words; a size where its name says bytes."""
    return size(value) if str(key).endswith("_bytes") else text_of(value)


def words(key: object) -> str:
    """A fact's key as words: ``max_p99_ms`` becomes ``max p99 (ms)``."""
    text = "images" if key == "num" else str(key).removeprefix("num_").replace("_", " ")
    text = {"gpus": "GPUs", "gpu driver": "GPU driver", "gpu reason": "why no GPU", "cpu": "CPU"}.get(text, text)
    text = {"dirty": "uncommitted changes", "cores": "CPU cores"}.get(text, text)
    for unit in ("ms", "seconds", "pixels", "percent"):
        text = f"{text.removesuffix(f' {unit}')} ({unit})" if text.endswith(f" {unit}") else text
    return text.removesuffix(" bytes")


def capability(value: object) -> str:
    """A compute capability as NVIDIA writes it: ``"89"`` is 8.9, ``"120"`` is 12.0."""
    text = str(value)
    return f"{text[:-1]}.{text[-1]}" if text.isdigit() and len(text) > 1 else text


def shell_lines(command: object) -> str:
    """A long command over several lines, broken between arguments; still a command that can be pasted."""
    lines: list[str] = []
    for word in re.findall(r"(?:'[^']*'|\S)+", text_of(command)):
        if lines and len(lines[-1]) + len(word) < COMMAND_WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}" if lines else word)
    return " \\\n".join(lines)


def moment(value: str) -> str:
    """An ISO time in UTC as date, hour and minute."""
    return f"{value[:10]} {value[11:16]} UTC"


def cell(value: object) -> str:
    """Text that cannot break out of a Markdown table cell."""
    return text_of(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
