"""detectron2's own model zoo, exported as a user's model: ONNX Runtime finds what detectron2 finds, box for box.

    python bench/model_zoo.py --annotations instances_val.json --images FOLDER [--only CONFIG ...] [--write]

The weights are random, with norms and last layers calibrated so that hundreds of boxes pass. Configuration and
checkpoint are read as `python -m pipeline export` reads them, twice: for 18 images on a canvas of 320 x 512, and for 2
on detectron2's own test size, 800 x 1344. Exit code 1 when a detection has no partner by the limits of `export.parity`.
`--write` with `--only` keeps the rows of other configurations that the result has.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]

from record import write_result  # noqa: E402

from export.detector_graph import detector_graph, signature_of  # noqa: E402
from export.parity import combined, match_detections  # noqa: E402
from export.runners import OnnxRuntimeRunner  # noqa: E402
from export.signature import DetectorSignature  # noqa: E402
from export.targets.onnx_target import export_onnx  # noqa: E402
from pipeline.own_model import prepared  # noqa: E402
from pipeline.recipe import FOLDER_RECIPE  # noqa: E402
from serving.preprocessing import canvas_from_image, read_image  # noqa: E402
from tests.calibration import calibrate  # noqa: E402
from tests.export import conftest, tiny_two_stage  # noqa: E402

CONFIGS = (
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "COCO-Detection/fcos_R_50_FPN_1x.py",
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
)
SMALL, ZOO_SIZE = ("export.canvas=[320,512]",), ()
NUM_SMALL, NUM_ZOO_SIZE = 18, 2
MODEL = "model.onnx"
RESULT = ROOT / "bench" / "results" / "model_zoo.json"


def main() -> int:
    arguments = _arguments()
    documents = json.loads(arguments.annotations.read_text())["images"][: NUM_SMALL + NUM_ZOO_SIZE]
    files = [arguments.images / document["file_name"] for document in documents]
    rows = [row for config in arguments.only for row in measured(config, files)]
    failed = [row for row in rows if row["num_unmatched"] or not row["num_matched"]]
    if arguments.write:
        known = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
        kept = [row for row in known if row["config"] not in arguments.only]
        command = "python bench/model_zoo.py --annotations instances_val.json --images FOLDER --only CONFIG --write"
        print(f"written to {write_result(RESULT.stem, {'rows': [*kept, *rows]}, command)}")
    return 1 if failed else 0


def measured(config: str, files: list[Path]) -> list[dict[str, Any]]:
    """One row a canvas."""
    detector = stock_detector(config)
    calibrate(detector, conftest.canvases(320, 512, 4, seed=1))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "model_final.pth"
        torch.save({"model": detector.state_dict()}, weights)
        for overrides, shown in ((SMALL, files[:NUM_SMALL]), (ZOO_SIZE, files[NUM_SMALL:])):
            started = time.process_time()
            signature = exported(config, weights, overrides, Path(scratch))
            row = {"config": config, **matched(detector, Path(scratch) / MODEL, signature, shown)}
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            rows.append({**row, "cpu_seconds": time.process_time() - started, "peak_memory_bytes": peak_bytes})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def stock_detector(config: str) -> nn.Module:
    """Built as detectron2's own tools do, without any part of this project."""
    torch.manual_seed(0)
    found = model_zoo.get_config(config)
    if not isinstance(found, CfgNode):
        return instantiate(found.model)
    found.MODEL.DEVICE = "cpu"
    return build_model(found)


def exported(config: str, weights: Path, overrides: Sequence[str], folder: Path) -> DetectorSignature:
    """Write the ONNX model of a user's configuration and checkpoint."""
    recipe, detector = prepared(config, weights, overrides, folder / FOLDER_RECIPE)
    export, imported = recipe.sections["export"], recipe.sections["training"]
    signature = signature_of(
        detector,
        canvas=export.canvas,
        short_edge=export.short_edge_pixels,
        max_edge=export.max_edge_pixels,
        class_names=imported.class_names,
        category_ids=imported.category_ids,
        max_batch_size=export.max_batch_size,
    )
    export_onnx(detector_graph(detector, signature), signature, folder / MODEL)
    return signature


def matched(detector: nn.Module, model: Path, signature: DetectorSignature, files: list[Path]) -> dict[str, Any]:
    """detectron2's inference against ONNX Runtime's on the same canvases, detection by detection."""
    reference = (tiny_two_stage if hasattr(detector, "roi_heads") else conftest).detectron2_detections
    results = []
    with OnnxRuntimeRunner(model, signature) as runner:
        for file in files:
            canvas, _ = canvas_from_image(read_image(file), signature)
            results.append(
                match_detections(
                    reference(detector, canvas),
                    runner.run(canvas[None])[0],
                    score_threshold=signature.score_threshold,
                    max_detections=signature.max_detections,
                )
            )
    total = combined(results)
    keys = ("num_images", "num_matched", "num_unmatched", "num_tolerated", "min_iou")
    errors = ("max_box_error_pixels", "max_score_error", "max_mask_error")
    canvas_size = [signature.canvas_height, signature.canvas_width]
    return {"canvas": canvas_size, **{key: getattr(total, key) for key in (*keys, *errors)}}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="COCO annotation file; its first 20 images")
    parser.add_argument("--images", type=Path, required=True, help="their folder")
    parser.add_argument("--only", nargs="+", default=list(CONFIGS), metavar="CONFIG", help="these configurations alone")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
