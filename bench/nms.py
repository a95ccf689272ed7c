"""What each choice of NMS (export.nms) costs against the number of boxes, and the AP of a detector with each.

    python bench/nms.py [--repeats 20] [--threads 1] [--run runs/embedded [--recipe embedded]] [--write]

Timed is a model that looks up made-up candidates and does nothing but NMS, clipping and padding: 4,500 candidates of 80
classes, of which 0 to 4,500 are above the threshold, 100 detections. Sparse boxes lie all over the canvas and few drop
others; crowded ones are nearly the same three boxes, so that every one has to be looked at. `none` takes the best 100
without NMS, which is what the look-up costs. Choices alternate, so that what else the machine does falls on all; ratios
are of medians.

With `--run`, the student of a run is exported with each choice and evaluated on the run's validation set.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from record import write_result  # noqa: E402

from export.average_precision import average_precision  # noqa: E402
from export.config import NmsChoice  # noqa: E402
from export.detector_graph import detector_graph, signature_of  # noqa: E402
from export.graph_parts import DetectorGraph, Nms, Outputs, ended, nms_of  # noqa: E402
from export.nms import rows  # noqa: E402
from export.runners import OnnxRuntimeRunner, Runner, TensorRTRunner  # noqa: E402
from export.signature import DetectorSignature  # noqa: E402
from export.targets.onnx_target import export_onnx  # noqa: E402
from export.targets.tensorrt_target import EngineUnavailable, UnsupportedEngine, build_engine  # noqa: E402
from pipeline import recipe as recipes  # noqa: E402
from pipeline.artifact import open_artifact  # noqa: E402
from pipeline.training_stages import STUDENT_CHECKPOINT, dataset_of  # noqa: E402
from serving.preprocessing import canvas_from_image, detections_in_image, read_image  # noqa: E402
from training.checkpoint import load_student  # noqa: E402
from training.dataset import detectron2_dicts  # noqa: E402
from training.student import build_student  # noqa: E402

CHOICES: tuple[NmsChoice, ...] = ("portable", "onnx", "outside")
REFERENCE: NmsChoice = "portable"
NOTHING = "none"
NUM_CANDIDATES, NUM_CLASSES, NUM_DETECTIONS = 4500, 80, 100
IOU_THRESHOLD = 0.5
COUNTS = (0, 100, 400, 1000, 4500)
BATCH_SIZES = (1, 8)
CANVAS_PIXELS = 64  # of boxes the size of 2 to 12 pixels; NMS does not see the unit
NUM_WARMUP = 2
Candidates = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    arguments = _arguments()
    result: dict[str, Any] = {
        "num_candidates": NUM_CANDIDATES,
        "num_detections": NUM_DETECTIONS,
        "num_threads": arguments.threads,
        "num_repeats": arguments.repeats,
    }
    with tempfile.TemporaryDirectory() as scratch:
        signature = nms_signature()
        files = write_models(Path(scratch), signature)
        for runtime, runners, reasons in runtimes(files, signature, arguments.threads):
            rows = list(measured(runners, signature, arguments.repeats))
            result[runtime] = {"rows": rows, "not_run": reasons}
            _print(runtime, rows, reasons)
            for runner in runners.values():
                runner.close()
        if arguments.run is not None:
            result["accuracy"] = accuracy(arguments.run, arguments.recipe, Path(scratch), arguments.threads)
    if arguments.write:
        run = f" --run RUN --recipe {arguments.recipe or arguments.run.name}" if arguments.run is not None else ""
        command = f"python bench/nms.py --repeats {arguments.repeats} --threads {arguments.threads}{run} --write"
        print(f"written to {write_result('nms', result, command)}")


def scenes() -> dict[tuple[int, str], Candidates]:
    """One image's candidates, by the number above the threshold and where they lie."""
    found = {}
    for seed, count in enumerate(COUNTS):
        generator = torch.Generator().manual_seed(seed)
        for crowding in ("sparse", "crowded") if count else ("",):
            places = NUM_CANDIDATES if crowding == "sparse" else 3
            centres = torch.rand(places, 2, generator=generator) * (CANVAS_PIXELS - 12) + 6
            sizes = torch.rand(places, 2, generator=generator) * 10 + 2
            place = torch.randint(0, places, (NUM_CANDIDATES,), generator=generator)
            centre = centres[place] + 0.1 * torch.randn(NUM_CANDIDATES, 2, generator=generator)
            scores = torch.rand(NUM_CANDIDATES, generator=generator) * 0.9 + 0.05
            scores[torch.randperm(NUM_CANDIDATES, generator=generator)[count:]] = 0
            labels = torch.randint(0, NUM_CLASSES, (places,), generator=generator, dtype=torch.int32)[place]
            boxes = torch.cat([centre - sizes[place] / 2, centre + sizes[place] / 2], dim=1)
            found[count, crowding] = (boxes, scores, labels)
    return found


def nms_signature() -> DetectorSignature:
    return DetectorSignature(
        canvas_height=CANVAS_PIXELS,
        canvas_width=CANVAS_PIXELS,
        short_edge_pixels=CANVAS_PIXELS,
        max_edge_pixels=CANVAS_PIXELS,
        channel_order="RGB",
        pad_value=(0, 0, 0),
        max_batch_size=max(BATCH_SIZES),
        max_detections=NUM_DETECTIONS,
        score_threshold=0.05,
        nms_threshold=IOU_THRESHOLD,
        class_names=tuple(map(str, range(NUM_CLASSES))),
        category_ids=tuple(range(NUM_CLASSES)),
    )


class NmsOfScenes(DetectorGraph):
    """Takes images whose first pixel is the number of a scene; the rest of a detector is that look-up."""

    head_tensor_names = ()

    def __init__(self, signature: DetectorSignature, nms: Nms | None) -> None:
        super().__init__()
        self.signature, self.nms = signature, nms
        for name, values in zip(("boxes", "scores", "labels"), zip(*scenes().values(), strict=True), strict=True):
            self.register_buffer(name, torch.stack(values))

    def with_head_tensors(self, images: Tensor) -> tuple[Outputs, dict[str, Tensor]]:
        scene = images[:, 0, 0, 0].long()
        return ended(self.boxes[scene], self.scores[scene], self.labels[scene], self.nms, self.signature), {}


def best_without_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, iou_threshold: float, max_detections: int
) -> Candidates:
    """The best R candidates, overlapping or not."""
    best, index = scores.topk(max_detections, dim=1)
    return rows(boxes, index), best, labels.gather(1, index)


def write_models(directory: Path, signature: DetectorSignature) -> dict[str, Path]:
    """The ONNX file of each choice, and of no NMS at all."""
    files = {}
    forms: dict[str, Nms | None] = {choice: nms_of(choice, NUM_CLASSES) for choice in CHOICES}
    for choice, nms in (forms | {NOTHING: best_without_nms}).items():
        files[choice] = directory / f"{choice}.onnx"
        export_onnx(NmsOfScenes(signature, nms), signature, files[choice], ends_at_candidates=nms is None)
    return files


def runtimes(
    files: Mapping[str, Path], signature: DetectorSignature, num_threads: int
) -> Iterator[tuple[str, dict[str, Runner], dict[str, str]]]:
    """Each runtime with a runner of every file it takes, and why it does not take the others."""
    cpu = ["CPUExecutionProvider"]
    yield (
        "ONNX Runtime, CPU",
        {
            name: OnnxRuntimeRunner(path, signature, num_threads=num_threads, allow_spinning=False, providers=cpu)
            for name, path in files.items()
        },
        {},
    )
    on_gpu: dict[str, Runner] = {name: OnnxRuntimeRunner(path, signature) for name, path in files.items()}
    if all("CUDAExecutionProvider" in runner.providers for runner in on_gpu.values()):  # type: ignore[attr-defined]
        yield "ONNX Runtime, CUDA", on_gpu, {}
    else:
        yield "ONNX Runtime, CUDA", {}, dict.fromkeys(files, "no NVIDIA GPU that ONNX Runtime can use")
    engines: dict[str, Runner] = {}
    reasons = {}
    for name, path in files.items():
        plan = path.with_suffix(".plan")
        try:
            build_engine(path, plan, signature, compute_capabilities=_this_gpu())
            engines[name] = TensorRTRunner(plan, signature)
        except (EngineUnavailable, UnsupportedEngine) as error:
            reasons[name] = str(error)
    yield "TensorRT", engines, reasons


def _this_gpu() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        raise EngineUnavailable("no NVIDIA GPU")
    major, minor = torch.cuda.get_device_capability()
    return (f"{major}{minor}",)


def measured(runners: Mapping[str, Runner], signature: DetectorSignature, num_repeats: int) -> Iterator[dict[str, Any]]:
    """Median milliseconds a batch of each runner on each scene, after checking that they find the same."""
    generator = np.random.default_rng(0)
    for batch_size in BATCH_SIZES if REFERENCE in runners else ():
        for scene, (count, crowding) in enumerate(scenes()):
            images = np.full((batch_size, *signature.image_shape), scene, np.uint8)
            seconds: dict[str, list[float]] = {name: [] for name in runners}
            found = {name: runner.run(images)[-1] for name, runner in runners.items() if name != NOTHING}
            for turn in range(NUM_WARMUP + num_repeats):
                for name in generator.permutation(list(runners)).tolist():
                    start = time.perf_counter()
                    runners[name].run(images)
                    if turn >= NUM_WARMUP:
                        seconds[name].append(time.perf_counter() - start)
            milliseconds = {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}
            yield {
                "batch_size": batch_size,
                "num_boxes": count,
                "crowding": crowding,
                "num_found": len(found[REFERENCE]),
                "same_detections": all(np.array_equal(each.boxes, found[REFERENCE].boxes) for each in found.values()),
                "ms": milliseconds,
                "ratio_to_portable": {name: value / milliseconds[REFERENCE] for name, value in milliseconds.items()},
            }


def accuracy(run_dir: Path, recipe_name: str | None, scratch: Path, num_threads: int) -> list[dict[str, Any]]:
    """AP of a run's student with each choice in ONNX Runtime on the CPU, and what the whole detector takes an image."""
    recipe = recipes.load(recipe_name or run_dir.name)
    dataset, config = dataset_of(open_artifact(run_dir / "data"), "validation"), recipe.sections["export"]
    checkpoint = open_artifact(run_dir / "strip").path(STUDENT_CHECKPOINT)
    student = load_student(build_student(recipe.model, len(dataset.class_names)), checkpoint)
    signature = signature_of(
        student,
        canvas=config.canvas,
        short_edge=config.short_edge_pixels,
        max_edge=config.max_edge_pixels,
        class_names=dataset.class_names,
        category_ids=dataset.category_ids,
        max_batch_size=config.max_batch_size,
    )
    found = []
    for choice in CHOICES:
        path = scratch / f"student_{choice}.onnx"
        graph = detector_graph(student, signature, choice)
        export_onnx(graph, signature, path, ends_at_candidates=choice == "outside")
        detections, seconds = {}, []
        with OnnxRuntimeRunner(path, signature, num_threads=num_threads, providers=["CPUExecutionProvider"]) as runner:
            for record in detectron2_dicts(dataset):
                canvas, placement = canvas_from_image(read_image(Path(record["file_name"])), signature)
                start = time.perf_counter()
                (on_canvas,) = runner.run(canvas[None])
                seconds.append(time.perf_counter() - start)
                detections[record["image_id"]] = detections_in_image(on_canvas, placement)
        scores = average_precision(dataset.annotation_file, detections, signature.category_ids).scores
        row = {"nms": choice, "AP": scores["AP"], "AP50": scores["AP50"], "ms": 1e3 * float(np.median(seconds))}
        found.append({**row, "num_images": len(detections)})
        print(f"{run_dir.name}, {choice:9s} AP {row['AP']:6.2f}  AP50 {row['AP50']:6.2f}  {row['ms']:8.2f} ms an image")
    return found


def _print(runtime: str, table: list[dict[str, Any]], reasons: Mapping[str, str]) -> None:
    print(f"{runtime}: ms a batch (ratio to {REFERENCE})")
    for row in table:
        cells = "  ".join(
            f"{name} {row['ms'][name]:8.3f} ({row['ratio_to_portable'][name]:5.2f})" for name in row["ms"]
        )
        same = "" if row["same_detections"] else "  DETECTIONS DIFFER"
        print(f"  batch {row['batch_size']}, {row['num_boxes']:4d} boxes {row['crowding']:7s} {cells}{same}")
    for name, reason in reasons.items():
        print(f"  {name}: not run: {reason}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="of each measurement")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime's CPU sessions")
    parser.add_argument("--run", type=Path, help="folder of a run that came as far as strip, for AP with each choice")
    parser.add_argument("--recipe", help="the run's recipe; by default the one that the folder is called after")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/nms.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
