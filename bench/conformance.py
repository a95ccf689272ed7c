"""Every recipe at its full size of model: trains, strips, and loads where no distiller is (tests/conformance).

    python bench/conformance.py [--only retinanet_r50_2x ...] [--write]

Exit code 1 when a recipe does not conform. ``--write`` keeps the table, failures included, in bench/results.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from record import write_result  # noqa: E402

TESTS = "tests/conformance/test_recipes.py"
TEST = f"{TESTS}::test_every_recipe_trains_strips_and_loads_alone"
MAX_MESSAGE = 400


def main() -> None:
    arguments = _arguments()
    selected = [f"{TEST}[{name}]" for name in arguments.only] or [TEST]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        options = [
            "-m",
            "conformance",
            "-o",
            "junit_family=xunit1",
            "-p",
            "no:cacheprovider",
            "--basetemp",
            f"{scratch}/runs",
            "--timeout=1800",
        ]
        command = [sys.executable, "-m", "pytest", *selected, *options, f"--junitxml={report}"]
        code = subprocess.run([*command, "-v", "--tb=short"], cwd=ROOT, check=False).returncode
        rows = rows_of(report) if report.is_file() else []
    num_conforming = sum(row["conforms"] for row in rows)
    print(f"{num_conforming} of {len(rows)} recipes conform")
    if arguments.write:
        only = f" --only {' '.join(arguments.only)}" if arguments.only else ""
        result = {
            "num_conforming": num_conforming,
            "num_recipes": len(rows),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            "rows": rows,
        }
        print(f"written to {write_result('conformance_recipes', result, f'python bench/conformance.py{only} --write')}")
    raise SystemExit(code)


def rows_of(report: Path) -> list[dict[str, Any]]:
    """One row a recipe, from pytest's JUnit report."""
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        failures = [*case.findall("failure"), *case.findall("error")]
        row: dict[str, Any] = {
            "recipe": case.attrib["name"].partition("[")[2].removesuffix("]"),
            "conforms": not failures and case.find("skipped") is None,
            "seconds": float(case.attrib["time"]),
        }
        row |= {each.attrib["name"]: json.loads(each.attrib["value"]) for each in case.findall("properties/property")}
        if failures:
            row["failure"] = failures[0].attrib.get("message", "")[:MAX_MESSAGE]
        rows.append(row)
    return rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="RECIPE", help="these recipes alone")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
