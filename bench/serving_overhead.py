"""What serving costs: gRPC through tritonserver against ONNX Runtime in process, in interleaved pairs.

    python bench/serving_overhead.py runs/embedded/export runs/embedded/data/images [--write]

Both sides run the same file with the same session options (threads, spinning off), one image a request, concurrency 1,
queue delay 0, through the same runner protocol: canvases in, detections out. A pair is one image on each side, in an
order drawn anew each time, so that drifts of the machine hit both. Printed: medians, and the median difference with a
bootstrap 95 % interval. `--write` keeps the numbers in bench/results with machine and versions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from export.runners import OnnxRuntimeRunner, Runner  # noqa: E402
from export.signature import DetectorSignature  # noqa: E402
from pipeline import environment  # noqa: E402
from serving.client import TritonRunner  # noqa: E402
from serving.model_config import DynamicBatching  # noqa: E402
from serving.model_repository import publish  # noqa: E402
from serving.preprocessing import canvas_from_image, read_image  # noqa: E402
from serving.servers import SERVERS  # noqa: E402

MODEL_NAME = "serving_overhead"
TARGET_MS = 5.0
NUM_WARMUP = 20
NUM_BOOTSTRAPS = 10_000


def main() -> int:
    arguments = _arguments()
    signature = DetectorSignature.read(arguments.model)
    model_file = arguments.model / "model.onnx"
    canvases = _canvases(arguments.images, signature, num=32)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        publish(
            scratch / "repository",
            model_name=MODEL_NAME,
            model_file=model_file,
            signature=signature,
            backend="python",
            provenance={},
            dynamic_batching=DynamicBatching(max_queue_delay_microseconds=0),
            num_threads=arguments.threads,
            allow_spinning=False,
        )
        server = stack.enter_context(
            SERVERS["wheel"].start(scratch / "repository", [MODEL_NAME], log_path=scratch / "server.log")
        )
        grpc = stack.enter_context(TritonRunner(server.grpc_url, MODEL_NAME))
        in_process = stack.enter_context(
            OnnxRuntimeRunner(
                model_file,
                signature,
                num_threads=arguments.threads,
                allow_spinning=False,
                providers=["CPUExecutionProvider"],
            )
        )
        before = grpc.statistics()
        pairs_ms = measure_pairs(grpc, in_process, canvases, arguments.pairs)
        counted = grpc.statistics() - before
    result = _result(pairs_ms) | {
        "server_ms": counted.milliseconds_per_request(),
        "num_threads": arguments.threads,
        "canvas": list(signature.image_shape),
        "model_bytes": model_file.stat().st_size,
    }
    _report(result)
    if arguments.write:
        _write(result)
    return 0


def measure_pairs(grpc: Runner, in_process: Runner, canvases: np.ndarray, num_pairs: int) -> np.ndarray:
    """Latencies in milliseconds, (num_pairs, 2): gRPC, in process."""
    generator = np.random.default_rng(0)
    runners = (grpc, in_process)
    for turn in range(NUM_WARMUP):
        for runner in runners:
            runner.run(canvases[turn % len(canvases)][None])
    latencies = np.zeros((num_pairs, 2))
    for turn in range(num_pairs):
        batch = canvases[turn % len(canvases)][None]
        for side in generator.permutation(2).tolist():
            start = time.perf_counter()
            runners[side].run(batch)
            latencies[turn, side] = time.perf_counter() - start
    return latencies * 1e3


def _result(pairs_ms: np.ndarray) -> dict[str, Any]:
    difference = pairs_ms[:, 0] - pairs_ms[:, 1]
    generator = np.random.default_rng(0)
    resampled = np.median(generator.choice(difference, (NUM_BOOTSTRAPS, len(difference))), axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {
        "num_pairs": len(pairs_ms),
        "grpc_median_ms": float(np.median(pairs_ms[:, 0])),
        "in_process_median_ms": float(np.median(pairs_ms[:, 1])),
        "median_difference_ms": float(np.median(difference)),
        "interval_95_ms": [float(low), float(high)],
        "target_ms": TARGET_MS,
        "target_met": bool(np.median(difference) <= TARGET_MS),
    }


def _report(result: dict[str, Any]) -> None:
    low, high = result["interval_95_ms"]
    server = ", ".join(f"{key.removesuffix('_ms')} {value:.2f}" for key, value in result["server_ms"].items())
    print(f"gRPC median        {result['grpc_median_ms']:8.2f} ms   (server: {server} ms)")
    print(f"in-process median  {result['in_process_median_ms']:8.2f} ms")
    print(
        f"serving overhead   {result['median_difference_ms']:8.2f} ms   95 % interval {low:.2f} to {high:.2f} ms, "
        f"{result['num_pairs']} pairs; target <= {TARGET_MS:g} ms: {'met' if result['target_met'] else 'missed'}"
    )


def _write(result: dict[str, Any]) -> None:
    path = ROOT / "bench" / "results" / "serving_overhead.json"
    path.parent.mkdir(exist_ok=True)
    command = "python bench/serving_overhead.py MODEL IMAGES --write"
    path.write_text(json.dumps(result | {"command": command, "environment": environment.facts()}, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


def _canvases(folder: Path, signature: DetectorSignature, num: int) -> np.ndarray:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png"})[:num]
    if not files:
        raise SystemExit(f"{folder}: no .jpg or .png images in it")
    return np.stack([canvas_from_image(read_image(path), signature)[0] for path in files])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("model", type=Path, help="folder with model.onnx and signature.json")
    parser.add_argument("images", type=Path, help="folder with images")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2, help="of both ONNX Runtime sessions")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
