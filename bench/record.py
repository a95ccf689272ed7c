"""Keeping what a benchmark measured, with the machine it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline import environment

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(name: str, result: dict[str, Any], command: str) -> Path:
    """Write ``bench/results/<name>.json``: the numbers, the command that repeats them, the machine and its versions."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**result, "command": command, "environment": environment.facts()}, indent=1) + "\n")
    return path
