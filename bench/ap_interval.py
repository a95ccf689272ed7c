"""What the 95 % interval of an AP costs: weighted accumulation of all resamples beside pycocotools on one of them.

    python bench/ap_interval.py [--write]

Generated detections: for each object a box that is off by a few pixels, and as many false ones as make the number asked
for; sizes are those of the embedded validation split and of COCO's val2017. One core. pycocotools is run once on the
data set as it is, which is what each of 1,000 resamples would cost without the matches of the first evaluation; its
`accumulate` alone is what it would cost with them. Printed: seconds of each, and how many times as long 1,000 of those
take as our 1,000. `--write` keeps the numbers in bench/results with machine and versions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from record import write_result  # noqa: E402

from export.average_precision_interval import (  # noqa: E402
    NUM_RESAMPLES,
    class_matches,
    paired_interval,
    resampled_average_precision,
)

SIZES = {  # images, classes, objects, detections
    "embedded": (400, 16, 2_280, 36_000),
    "COCO val2017": (5_000, 80, 36_000, 450_000),
}
EDGE_PIXELS = 640


def main() -> int:
    arguments = _arguments()
    result = {"num_resamples": NUM_RESAMPLES, "sizes": {name: _measured(*size) for name, size in SIZES.items()}}
    print(json.dumps(result, indent=1))
    if arguments.write:
        print(f"written to {write_result('ap_interval', result, 'python bench/ap_interval.py --write')}")
    return 0


def _measured(num_images: int, num_classes: int, num_objects: int, num_detections: int) -> dict[str, Any]:
    truth, results = _generated(num_images, num_classes, num_objects, num_detections)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluate_seconds = _seconds(evaluator.evaluate)
        accumulate_seconds = _seconds(evaluator.accumulate)
        evaluator.summarize()
    started = time.process_time()
    resampled = resampled_average_precision(class_matches(evaluator))
    low, high = paired_interval(resampled, np.zeros_like(resampled))
    seconds = time.process_time() - started
    return {
        "num_images": num_images,
        "num_classes": num_classes,
        "num_objects": num_objects,
        "num_detections": num_detections,
        "AP": 100 * float(evaluator.stats[0]),
        "interval": (low, high),
        "seconds": seconds,
        "pycocotools_evaluate_seconds": evaluate_seconds,
        "pycocotools_accumulate_seconds": accumulate_seconds,
        "times_as_long_naive": NUM_RESAMPLES * (evaluate_seconds + accumulate_seconds) / seconds,
        "times_as_long_accumulating": NUM_RESAMPLES * accumulate_seconds / seconds,
    }


def _generated(
    num_images: int, num_classes: int, num_objects: int, num_detections: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    random = np.random.default_rng(0)

    def boxes(count: int) -> np.ndarray:
        sizes = random.uniform(16, 200, (count, 2))
        return np.concatenate([random.uniform(0, 1, (count, 2)) * (EDGE_PIXELS - sizes), sizes], axis=1)

    objects, images = boxes(num_objects), random.integers(1, num_images + 1, num_detections)
    classes = random.integers(1, num_classes + 1, num_detections)
    found = np.concatenate([objects + random.normal(0, 5, objects.shape), boxes(num_detections - num_objects)])
    scores = np.concatenate([random.beta(4, 2, num_objects), random.beta(1, 4, num_detections - num_objects)])
    annotations = [
        {"id": i + 1, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, (image, label, box) in enumerate(
            zip(images[:num_objects].tolist(), classes.tolist(), objects.tolist(), strict=False)
        )
    ]
    truth = {
        "images": [{"id": i, "width": EDGE_PIXELS, "height": EDGE_PIXELS} for i in range(1, num_images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in range(1, num_classes + 1)],
    }
    results = [
        {"image_id": image, "category_id": label, "bbox": box, "score": score}
        for image, label, box, score in zip(
            images.tolist(), classes.tolist(), found.tolist(), scores.tolist(), strict=True
        )
    ]
    return truth, results


def _seconds(run: Any) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the result as bench/results/ap_interval.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
