"""What LGD costs a training step: seconds and memory of the plain student and of LGD, in total and by part.

    python bench/training_step.py [--detectors retinanet fcos ...] [--channels 128] [--depth 50] [--size 256] [--write]

The detectors are the recipes' model parts on a ResNet with random weights; images and labels are made up. Plain and LGD
steps alternate, so that what else the machine does falls on both; the ratio is of their medians. A part is timed alone,
forward and backward, on inputs that need gradients where the part's would: student (backbone, head, losses), teacher
(labels and features to instructive features), second head pass (the student's head and losses on those), distillation
loss (adapter and comparison), optimizer. "freeze window" is LGD while the bottom-up network does not train.

Peak memory is of tensors: parameters, gradients, momentum, and the most that a step holds beside them at a time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
from detectron2.structures import Boxes, Instances, PolygonMasks  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from record import write_result  # noqa: E402
from torch import Tensor  # noqa: E402

from pipeline import recipe_parts  # noqa: E402
from training.acceleration import keep_predictions_in_float32  # noqa: E402
from training.config import TrainingConfig  # noqa: E402
from training.detection_losses import detection_losses, distilled_levels, label_assignment  # noqa: E402
from training.distilled_detector import DistilledDetector, on_device  # noqa: E402
from training.distillers import LgdConfig, NoDistillerConfig  # noqa: E402
from training.optimization import Optimizers, build_optimizers  # noqa: E402
from training.student import build_student  # noqa: E402
from training.train import distilled_detector  # noqa: E402

ONE_STAGE = ("retinanet", "fcos", "paper_fcos", "atss", "gfl")
TWO_STAGE = ("faster_rcnn", "mask_rcnn")
NUM_CLASSES = 80
BOXES_PER_IMAGE = 8


def main() -> None:
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    rows = []
    for name in arguments.detectors:
        with EventStorage():
            row = measured(name, arguments)
        rows.append(row)
        print(_line(row), flush=True)
    if arguments.write:
        command = "python bench/training_step.py " + " ".join(sys.argv[1:])
        settings = {key: value for key, value in vars(arguments).items() if key not in ("write", "detectors", "name")}
        print(f"written to {write_result(arguments.name, {'settings': settings, 'rows': rows}, command)}")


def measured(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One detector's row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {
        "plain": Step(name, NoDistillerConfig(), arguments, device),
        "lgd": Step(name, LgdConfig(distill_from_iter=0, freeze_backbone_until_iter=0), arguments, device),
        "lgd in the freeze window": Step(name, LgdConfig(freeze_backbone_until_iter=1), arguments, device),
    }
    seconds = _alternating({key: step.run for key, step in steps.items()}, arguments.repeats, device)
    peaks = {key: step.resident_bytes() + _peak_bytes(step.run, device) for key, step in steps.items()}
    parts = _alternating(steps["lgd"].parts(), arguments.repeats, device)
    return {
        "detector": name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "seconds": seconds,
        "ratio": seconds["lgd"] / seconds["plain"],
        "ratio_in_freeze_window": seconds["lgd in the freeze window"] / seconds["plain"],
        "part_seconds": parts,
        "peak_bytes": peaks,
        "memory_ratio": peaks["lgd"] / peaks["plain"],
    }


class Step:
    """A training step of one detector with one distiller on one batch."""

    def __init__(self, name: str, distiller: Any, arguments: argparse.Namespace, device: torch.device) -> None:
        self.precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
        self.device = device
        student = build_student(_model(name, arguments), NUM_CLASSES, seed=0)
        self.detector: DistilledDetector = distilled_detector(student, distiller)
        self.detector.to(device, memory_format=torch.channels_last).train()
        keep_predictions_in_float32(self.detector.student)
        self.batch = _batch(arguments, with_masks=name == "mask_rcnn")
        config = TrainingConfig(
            max_iter=1, images_per_batch=len(self.batch), learning_rate=1e-4, short_edge_pixels=(1,), max_edge_pixels=1
        )
        self.optimizers: Optimizers = build_optimizers(self.detector, config)

    def run(self) -> None:
        with self._autocast():
            losses = self.detector(self.batch)
        self._learn_from(sum(losses.values()))
        self.optimizers.step()

    def resident_bytes(self) -> int:
        """What lies in memory between two steps."""
        state = [x for of in self.optimizers.by_owner.values() for x in of.state.values()]
        parameters = list(self.detector.parameters())
        tensors = [
            *parameters,
            *self.detector.buffers(),
            *(p.grad for p in parameters if p.grad is not None),
            *(value for of in state for value in of.values() if isinstance(value, Tensor)),
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def parts(self) -> dict[str, Callable[[], None]]:
        """The step's parts, each forward and backward, to be timed alone."""
        student, distiller = self.detector.student, self.detector.distiller
        batch = on_device(self.batch, self.device)
        images = student.preprocess_image(batch)
        labels = [x["instances"] for x in batch]
        with torch.no_grad(), self._autocast():
            features = student.backbone(images.tensor)
            teacher = distiller.teacher_features(self._distilled(features), labels, tuple(images.tensor.shape[-2:]))
            assigned = label_assignment(student, features, labels)

        def leaves(of: dict[str, Tensor]) -> dict[str, Tensor]:
            return {level: feature.clone().requires_grad_() for level, feature in of.items()}

        def run_student() -> None:
            with self._autocast():
                found = student.backbone(student.preprocess_image(on_device(self.batch, self.device)).tensor)
                losses = detection_losses(student, images, found, labels, label_assignment(student, found, labels))
            self._learn_from(sum(losses.values()))

        def run_teacher() -> None:
            with self._autocast():
                made = distiller.teacher_features(
                    leaves(self._distilled(features)), labels, tuple(images.tensor.shape[-2:])
                )
            torch.autograd.backward(list(made.values()), [torch.ones_like(x) for x in made.values()])

        def run_second_head_pass() -> None:
            with self._autocast():
                losses = detection_losses(student, images, {**features, **leaves(teacher)}, labels, assigned)
            self._learn_from(sum(losses.values()))

        def run_distillation_loss() -> None:
            with self._autocast():
                loss = distiller.distillation_loss(leaves(self._distilled(features)), teacher, distill=True)
            self._learn_from(loss)

        return {
            "student": run_student,
            "teacher": run_teacher,
            "second head pass": run_second_head_pass,
            "distillation loss": run_distillation_loss,
            "optimizer": self.optimizers.step,
        }

    def _learn_from(self, loss: Any) -> None:
        self.optimizers.zero_grad()
        loss.backward()

    def _distilled(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {level: features[level] for level in distilled_levels(self.detector.student)}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)


def _model(name: str, arguments: argparse.Namespace) -> Any:
    features = ("res3", "res4", "res5") if name in ONE_STAGE else ("res2", "res3", "res4", "res5")
    bottom_up = recipe_parts.resnet(arguments.depth, out_features=features)
    part: Callable[..., Any] = getattr(recipe_parts, name)
    return part(bottom_up, channels=arguments.channels)


def _batch(arguments: argparse.Namespace, *, with_masks: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    size = arguments.size
    batch = []
    for _ in range(arguments.images):
        corners = torch.rand(BOXES_PER_IMAGE, 2, generator=generator) * size * 0.6
        extents = size * (0.05 + 0.35 * torch.rand(BOXES_PER_IMAGE, 2, generator=generator))
        boxes = torch.cat((corners, corners + extents), dim=1)
        instances = Instances((size, size), gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.randint(NUM_CLASSES, (BOXES_PER_IMAGE,), generator=generator)
        if with_masks:
            instances.gt_masks = PolygonMasks([[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()])
        image = torch.randint(256, (3, size, size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": size, "width": size})
    return batch


def _alternating(runs: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    samples: dict[str, list[float]] = {key: [] for key in runs}
    for repeat in range(repeats + 2):
        for key, run in runs.items():
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            if repeat >= 2:  # the first ones load kernels and fill caches
                samples[key].append(time.perf_counter() - started)
    return {key: statistics.median(values) for key, values in samples.items()}


def _peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Largest sum of what one step has allocated and not yet freed."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = sorted(
        (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _line(row: dict[str, Any]) -> str:
    seconds = row["seconds"]
    parts = "  ".join(f"{part} {value:.3f}" for part, value in row["part_seconds"].items())
    plain, lgd = (row["peak_bytes"][key] / 1e9 for key in ("plain", "lgd"))
    return (
        f"{row['detector']}: plain {seconds['plain']:.3f} s, LGD {seconds['lgd']:.3f} s, ratio {row['ratio']:.2f}, "
        f"in the freeze window {row['ratio_in_freeze_window']:.2f}; peak memory {plain:.2f} and {lgd:.2f} GB, "
        f"ratio {row['memory_ratio']:.2f}\n    by part: {parts}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", choices=ONE_STAGE + TWO_STAGE, default=list(ONE_STAGE + TWO_STAGE))
    parser.add_argument("--channels", type=int, default=128, help="of the pyramid")
    parser.add_argument("--depth", type=int, default=50, help="of the ResNet")
    parser.add_argument("--size", type=int, default=256, help="edge of the square images, pixels")
    parser.add_argument("--images", type=int, default=2, help="in the batch")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    parser.add_argument("--name", default="training_step", help="of the result's file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
