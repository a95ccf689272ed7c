"""Every recipe at its full size of model, and every family on every backbone in every target (tests/conformance).

    python bench/conformance.py [--only recipes | exports | retinanet_r50_2x ... | MaskRCNN ... | DCNv2 ...] [--write]

Exit code 1 when something does not conform. ``--write`` keeps the tables, failures included, in bench/results.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import resource
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]

from record import write_result  # noqa: E402

from pipeline.recipe import available  # noqa: E402
from tests.conformance.export_cells import CELLS, COLUMN, PRECISIONS, ROW, TARGETS  # noqa: E402
from tests.conformance.small_detectors import BACKBONES, FAMILIES  # noqa: E402

RECIPES = "tests/conformance/test_recipes.py::test_every_recipe_trains_strips_and_loads_alone"
EXPORTS = "tests/conformance/test_exports.py::test_every_cell_conforms"
PROCESSES = ["-n", "2", "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
"""Cells of one detector run in one process, which exports it once."""
MAX_MESSAGE = 400
MARKS = {"passed": "+", "failed": "F"}


def main() -> None:
    arguments = _arguments()
    codes = []
    names = set(arguments.only)
    recipes = [name for name in available() if name in names]
    rows_and_columns = [name for name in (*FAMILIES, *BACKBONES) if name in names]
    if not names or "recipes" in names or recipes:
        codes.append(conform_recipes(recipes, arguments))
    if not names or "exports" in names or rows_and_columns:
        codes.append(conform_exports(rows_and_columns, arguments))
    raise SystemExit(max(codes))


def conform_recipes(names: Sequence[str], arguments: argparse.Namespace) -> int:
    """Run these recipes, or all, and show how many conform; pytest's exit code."""
    code, cases, _ = run_tests([f"{RECIPES}[{name}]" for name in names] or [RECIPES])
    rows = [recipe_row(case) for case in cases]
    num_conforming = sum(row["conforms"] for row in rows)
    print(f"{num_conforming} of {len(rows)} recipes conform")
    if arguments.write:
        counts = {"num_conforming": num_conforming, "num_recipes": len(rows)}
        _write("conformance_recipes", {**counts, "peak_memory_bytes": _peak_bytes(), "rows": rows}, arguments)
    return code


def conform_exports(names: Sequence[str], arguments: argparse.Namespace) -> int:
    """Run the cells of these families and backbones, or all, and print the matrix; pytest's exit code."""
    cells = [f"{EXPORTS}[{cell}]" for cell in CELLS if cell.family in names or cell.backbone in names]
    # A thread a process: OpenMP's threads of two processes would fight for the cores.
    code, cases, seconds = run_tests([*(cells or [EXPORTS]), *PROCESSES], OMP_NUM_THREADS="1")
    rows = [export_row(case) for case in cases]
    table = matrix(rows)
    print("\n".join(table))
    if arguments.write:
        counts = collections.Counter(row["outcome"] for row in rows)
        ran = [row for row in rows if row["outcome"] != "not run"]
        result = {"seconds": round(seconds), "counts": counts, "matrix": table, "rows": ran}
        _write("conformance_exports", result, arguments)
    return code


def run_tests(selected: Sequence[str], **environment: str) -> tuple[int, list[ElementTree.Element], float]:
    """pytest's exit code, the cases of its JUnit report, and the seconds it took."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        options = ["-m", "conformance", "-o", "junit_family=xunit1", "-p", "no:cacheprovider", "--timeout=1800"]
        folders = ["--basetemp", f"{scratch}/runs", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *selected, *options, *folders, "-v", "--tb=short"]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    return code, cases, time.monotonic() - started


def recipe_row(case: ElementTree.Element) -> dict[str, Any]:
    failures = _failures(case)
    row: dict[str, Any] = {
        "recipe": _parameter(case),
        "conforms": not failures and case.find("skipped") is None,
        "seconds": float(case.attrib["time"]),
    }
    row |= _properties(case)
    return row | ({"failure": failures[0]} if failures else {})


def export_row(case: ElementTree.Element) -> dict[str, Any]:
    family, backbone, target, precision = _parameter(case).split("/")
    row: dict[str, Any] = {"family": family, "backbone": backbone, "target": target, "precision": precision}
    skipped, failures = case.find("skipped"), _failures(case)
    if failures:
        return {**row, "outcome": "failed", "failure": failures[0], **_properties(case)}
    if skipped is not None:
        return {**row, "outcome": "not run", "reason": skipped.attrib["message"].removeprefix("not run: ")}
    return {**row, "outcome": "passed", **_properties(case), "seconds": float(case.attrib["time"])}


def matrix(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each family on each backbone, a mark for each precision in each target, and what the marks mean."""
    letters: dict[str, str] = {}
    numbers: collections.Counter[str] = collections.Counter()
    marks: dict[tuple[str, str], dict[tuple[str, str], str]] = collections.defaultdict(dict)
    for row in rows:
        mark = MARKS.get(row["outcome"])
        if mark is None:
            reason = row["reason"]
            if reason.startswith("cost"):  # the same reason in each cell, with other names
                reason = f"cost: covered by {ROW} on the same backbone and the same family on {COLUMN}"
            mark = letters.setdefault(reason, string.ascii_lowercase[len(letters)])
        numbers[mark] += 1
        marks[row["family"], row["backbone"]][row["target"], row["precision"]] = mark
    lines = [" ".join([" " * 34, *(f"{target:<18}" for target in TARGETS)]).rstrip()]
    for (family, backbone), found in marks.items():
        groups = ["".join(found.get((target, name), " ") for name in PRECISIONS) for target in TARGETS]
        lines.append(" ".join([f"{family:<22}{backbone:<12}", *(f"{group:<18}" for group in groups)]).rstrip())
    lines += [f"a mark for each of {', '.join(PRECISIONS)}"]
    lines += [f"{mark} {outcome}: {numbers[mark]} cells" for outcome, mark in MARKS.items()]
    lines += [f"{letter} not run: {numbers[letter]} cells: {reason}" for reason, letter in letters.items()]
    lines += [
        f"failed: {row['family']} {row['backbone']} {row['target']} {row['precision']}: {row['failure']}"
        for row in rows
        if row["outcome"] == "failed"
    ]
    return lines


def _parameter(case: ElementTree.Element) -> str:
    """What is between the brackets of a case's name, without xdist's group."""
    return case.attrib["name"].partition("[")[2].partition("]")[0]


def _properties(case: ElementTree.Element) -> dict[str, Any]:
    return {each.attrib["name"]: json.loads(each.attrib["value"]) for each in case.findall("properties/property")}


def _failures(case: ElementTree.Element) -> list[str]:
    return [each.attrib.get("message", "")[:MAX_MESSAGE] for each in (*case.findall("failure"), *case.findall("error"))]


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _write(name: str, result: dict[str, Any], arguments: argparse.Namespace) -> None:
    only = f" --only {' '.join(arguments.only)}" if arguments.only else ""
    print(f"written to {write_result(name, result, f'python bench/conformance.py{only} --write')}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        choices=("recipes", "exports", *available(), *FAMILIES, *BACKBONES),
        help="recipes or exports, or these recipes, families and backbones alone",
    )
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
