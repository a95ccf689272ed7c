"""Images a second of one detector in every form: detectron2's own, torch.compile's, and the exported files.

    python bench/export.py [--run runs/embedded [--recipe embedded]] [--zoo CONFIG ...] [--threads 2] [--write]

Subjects are the student of a run, on its validation images, and configurations of detectron2's model zoo with random
weights, calibrated as in `bench/model_zoo.py`, on crops of photos. Each runs at batch 1 and at its largest batch.
Before it is timed, a form's detections are compared with detectron2's own: by the limits of `export.parity`, and by
class and IoU 0.5 for int8, which moves boxes. Forms alternate in an order drawn anew each round, on the same images;
a timed call follows an untimed one, so that caches and idle threads are its own. Ratios are of pairs of one round.

Products of two square matrices are timed in the same rounds. The best is the machine's limit, of which a form reaches
the share that the convolutions and matrix products of the network (fvcore's count of detectron2's detector) give it.

Exit code 1: our float32 file finds something else than detectron2 does, or one of our files did not run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from contenders import CONTENDERS, OURS, REFERENCE, Run, Setting  # noqa: E402
from matrix_limit import OPERATIONS, products  # noqa: E402
from record import write_result  # noqa: E402
from subjects import Subject, multiply_adds, student_of, zoo_subject  # noqa: E402

from export.agreement import agreement, agreement_by_image  # noqa: E402
from export.parity import combined, match_detections  # noqa: E402
from export.signature import Detections, DetectorSignature  # noqa: E402

ZOO = ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
NUM_WARMUP = 2
NAMES = tuple(dict.fromkeys(name for names in CONTENDERS.values() for name in names))
KEPT = (REFERENCE, OURS["cpu"][0])  # whatever else is left out
Rows = list[dict[str, Any]]


def main() -> int:
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is what is compared
    tables = [table for subject in _subjects(arguments) for table in measured(subject, arguments)]
    if arguments.write:
        settings = {key: getattr(arguments, key) for key in ("threads", "rounds", "size", "spinning", "only")}
        given = ["RUN" if argument == str(arguments.run) else argument for argument in sys.argv[1:]]
        command = shlex.join(["python", "bench/export.py", *given])
        print(f"written to {write_result('export', {'settings': settings, 'tables': tables}, command)}")
    return 0 if all(table["as_promised"] for table in tables) else 1


def measured(subject: Subject, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A table for each device and batch size."""
    gigaoperations = 2e-9 * multiply_adds(subject)
    for device in CONTENDERS:
        facts = {"subject": subject.name, "device": device, "gigaoperations_an_image": gigaoperations}
        if device == "cuda" and not torch.cuda.is_available():
            yield {**facts, "not_run": "no NVIDIA GPU (torch finds no CUDA device)", "as_promised": True}
            print(f"{subject.name}, cuda: not run: no NVIDIA GPU")
            continue
        subject.detector.to(device)
        with tempfile.TemporaryDirectory() as scratch:
            setting = Setting(
                device=torch.device(device),
                num_threads=arguments.threads,
                allow_spinning=arguments.spinning,
                scratch=Path(scratch),
            )
            for batch_size in (1, subject.signature.max_batch_size):
                rows, limits = raced(subject, setting, batch_size, arguments.rounds, {*KEPT, *arguments.only})
                table = {**facts, "batch_size": batch_size, **judged(rows, limits, device, batch_size, gigaoperations)}
                _print(table)
                yield table


def raced(
    subject: Subject, setting: Setting, batch_size: int, num_rounds: int, only: Set[str]
) -> tuple[Rows, dict[tuple[str, str], float]]:
    """Each contender's row with its seconds a batch by round, and the best GFLOP/s of each product."""
    torch._dynamo.reset()
    batches = [subject.canvases[i : i + batch_size] for i in range(0, len(subject.canvases), batch_size)]
    batches = [batch for batch in batches if len(batch) == batch_size]
    prepared = [_prepared(name, subject, setting, batches) for name in CONTENDERS[setting.device.type] if name in only]
    reference = next(found for row, _, found in prepared if row["name"] == REFERENCE)
    runs: dict[Any, Callable[[int], object]] = {}
    for row, run, found in prepared:
        if run is not None:
            row.update(compared(reference, found, subject.signature))
            runs[row["name"]] = lambda turn, run=run: run(batches[turn % len(batches)])
    limits = {key: (lambda turn, product=product: product()) for key, product in products(setting).items()}
    seconds = interleaved(runs | limits, num_rounds)
    for row, _, _ in prepared:
        row["seconds"] = seconds.get(row["name"])
    return [row for row, _, _ in prepared], {key: 1e-9 * OPERATIONS / min(seconds[key]) for key in limits}


def _prepared(
    name: str, subject: Subject, setting: Setting, batches: list[np.ndarray]
) -> tuple[dict[str, Any], Run | None, list[Detections]]:
    """A contender's row, its run, and what it finds; what export, compiler or runtime object to is in the row."""
    print(f"  {name} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        run = CONTENDERS[setting.device.type][name](subject, setting, batches[0])
        run(batches[0])
        elapsed = time.perf_counter() - start
        found = [each for batch in batches for each in run(batch)]
    except Exception as error:  # whatever it is, it is why there is no number
        return {"name": name, "not_run": f"{type(error).__name__}: {error}"[:500]}, None, []
    return {"name": name, "prepare_seconds": elapsed}, run, found


def interleaved(runs: dict[Any, Callable[[int], object]], num_rounds: int) -> dict[Any, list[float]]:
    """Seconds of each in each round, after an untimed call of its own."""
    generator = np.random.default_rng(0)
    names = list(runs)
    seconds: dict[Any, list[float]] = {name: [] for name in names}
    for turn in range(NUM_WARMUP + num_rounds):
        for position in generator.permutation(len(names)).tolist():
            run = runs[names[position]]
            run(turn)
            start = time.perf_counter()
            run(turn)
            if turn >= NUM_WARMUP:
                seconds[names[position]].append(time.perf_counter() - start)
    return seconds


def compared(reference: list[Detections], found: list[Detections], signature: DetectorSignature) -> dict[str, Any]:
    """How far detections are detectron2's: pairs by the limits of parity, and the share that has any partner."""
    exact = combined(
        match_detections(
            ours,
            theirs,
            score_threshold=signature.score_threshold,
            max_detections=signature.max_detections,
            nms_threshold=signature.nms_threshold,
        )
        for ours, theirs in zip(reference, found, strict=True)
    )
    floor = signature.score_threshold
    images = agreement_by_image(dict(enumerate(reference)), dict(enumerate(found)), score_floor=floor)
    return {
        "num_matched": exact.num_matched,
        "num_unmatched": exact.num_unmatched,
        "partner_rate": agreement(images.values(), score_floor=floor).matched_rate,
    }


def judged(
    rows: Rows, limits: dict[tuple[str, str], float], device: str, batch_size: int, gigaoperations: float
) -> dict[str, Any]:
    """The rows with their numbers, and ours against the fastest other."""
    seconds = {row["name"]: np.array(values) for row in rows if (values := row.pop("seconds"))}
    best = {kind: max(value for (precision, _), value in limits.items() if precision == kind) for kind, _ in limits}
    for row in (row for row in rows if row["name"] in seconds):
        values = seconds[row["name"]] / batch_size
        row["images_a_second"] = _quartiles(1 / values)
        row["ms_an_image"] = _quartiles(1e3 * values)
        row["times_as_fast_as_eager"] = _quartiles(seconds[REFERENCE] / seconds[row["name"]])
        row["gigaoperations_a_second"] = gigaoperations / float(np.median(values))
        limit = best.get("int8" if row["name"].endswith("int8") else "fp32")
        row["share_of_limit"] = row["gigaoperations_a_second"] / limit if limit else None
    others = {name: float(np.median(values)) for name, values in seconds.items() if name not in OURS[device]}
    fastest = min(others, key=lambda name: others[name])
    file = next(row for row in rows if row["name"] == OURS[device][0])
    return {
        "rows": rows,
        "limits": [{"precision": p, "library": library, "gflops": value} for (p, library), value in limits.items()],
        "fastest_other": fastest,
        "times_as_fast": {
            name: _quartiles(seconds[fastest] / seconds[name]) for name in OURS[device] if name in seconds
        },
        "as_promised": "not_run" not in file and file["num_matched"] > 0 and file["num_unmatched"] == 0,
    }


def _subjects(arguments: argparse.Namespace) -> Iterator[Subject]:
    if arguments.run is not None:
        yield student_of(arguments.run, arguments.recipe or arguments.run.name)
    for config in arguments.zoo:
        yield zoo_subject(config, arguments.size)


def _quartiles(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "p25": low, "p75": high}


def _print(table: dict[str, Any]) -> None:
    limits = ", ".join(f"{row['precision']} {row['library']} {row['gflops']:.0f}" for row in table["limits"])
    print(f"{table['subject']}, {table['device']}, batch {table['batch_size']} (best product, GFLOP/s: {limits})")
    for row in table["rows"]:
        if "not_run" in row:
            print(f"  {row['name']:34s} not run: {row['not_run'].splitlines()[0]}")
            continue
        images, faster = row["images_a_second"], row["times_as_fast_as_eager"]
        share = "" if row["share_of_limit"] is None else f"  {100 * row['share_of_limit']:4.1f} % of limit"
        print(
            f"  {row['name']:34s} {images['median']:8.2f} images/s ({images['p25']:.2f} to {images['p75']:.2f})  "
            f"{faster['median']:5.2f} x eager{share}  prepared in {row['prepare_seconds']:.1f} s  "
            f"{row['num_unmatched']} unmatched, partners {100 * (row['partner_rate'] or 0):.1f} %"
        )
    for name, ratio in table["times_as_fast"].items():
        print(
            f"  {name}: {ratio['median']:.2f} ({ratio['p25']:.2f} to {ratio['p75']:.2f}) times as fast as "
            f"{table['fastest_other']}, the fastest other"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run that came as far as export")
    parser.add_argument("--recipe", help="the run's recipe; by default the one that the folder is called after")
    parser.add_argument("--zoo", nargs="*", default=list(ZOO), metavar="CONFIG", help="of detectron2's model zoo")
    parser.add_argument("--only", nargs="*", choices=NAMES, default=list(NAMES), metavar="FORM", help=f"of {NAMES}")
    parser.add_argument("--size", type=int, default=320, help="edge of the zoo's square canvas, pixels")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch and ONNX Runtime")
    parser.add_argument("--spinning", action="store_true", help="let ONNX Runtime's idle threads spin, in every file")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each form")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/export.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
