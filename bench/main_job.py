"""Time, peak memory and AP of the whole main job, as `make train-export-deploy` runs it, from nothing.

    python bench/main_job.py embedded [section.key=value ...] [--write NAME]

The job runs in a folder of its own below runs/. Memory is the resident memory of the job and everything it starts, the
server included, summed once a second, so pages that processes share count more than once.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from record import write_result  # noqa: E402

RUN_NAME = "bench_main_job"


def main() -> int:
    arguments = _arguments()
    run_dir = ROOT / "runs" / RUN_NAME
    if run_dir.exists():
        raise SystemExit(f"{run_dir} is there from an earlier measurement; remove it first")
    command = [sys.executable, "-m", "pipeline", "run", arguments.recipe, *arguments.overrides, "--name", RUN_NAME]
    started = time.perf_counter()
    job = subprocess.Popen(command, cwd=ROOT)
    peak_bytes = 0
    while job.poll() is None:
        peak_bytes = max(peak_bytes, _resident_bytes(job.pid))
        time.sleep(1.0)
    result = {
        "recipe": arguments.recipe,
        "overrides": [re.sub(r"=.*/", "=…/", override) for override in arguments.overrides],
        "exit_code": job.returncode,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_bytes,
        **_found(run_dir),
    }
    print(json.dumps(result, indent=1))
    if arguments.write:
        path = write_result(arguments.write, result, "python bench/main_job.py RECIPE [OVERRIDES] --write NAME")
        print(f"written to {path}")
    return job.returncode


def _resident_bytes(pid: int) -> int:
    """Of a process and all its descendants."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue  # it ended meanwhile
    except psutil.Error:
        pass
    return total


def _found(run_dir: Path) -> dict[str, Any]:
    """What the run's report says, as far as it goes."""
    manifests = {path.parent.name: json.loads(path.read_text()) for path in run_dir.glob("*/manifest.json")}
    facts = {name: manifest["facts"] for name, manifest in manifests.items()}
    metrics = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
    keys = ("name", "status", "reason", *metrics, "compared_with", "differences")
    rows = facts.get("validate", {}).get("rows", []) + facts.get("deploy", {}).get("rows", [])
    benchmark = facts.get("benchmark", {})
    return {
        "stage_seconds": {name: manifest["seconds"] for name, manifest in manifests.items()},
        "ap_curve": facts.get("train", {}).get("ap_curve"),
        "accuracy": [{key: row.get(key) for key in keys} for row in rows],
        "matching": facts.get("validate", {}).get("matching"),
        "batch_invariance": facts.get("deploy", {}).get("batch_invariance"),
        "latency": {
            key: benchmark.get(key) for key in ("closed_loop", "open_loop", "in_process", "serving_overhead_ms")
        },
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--write", metavar="NAME", help="keep the result as bench/results/NAME.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
