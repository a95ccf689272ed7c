"""Tiny training runs that several tests start: settings, a data set of equally large images, what a run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import build_tiny_retinanet
from PIL import Image
from torch import Tensor, nn

from training.checkpoint import FINAL_CHECKPOINT, read_checkpoint
from training.config import TrainingConfig
from training.dataset import CocoDataset, read_coco
from training.distillers import LgdConfig
from training.train import TrainingResult, train

LGD = LgdConfig(distill_from_iter=1, freeze_backbone_until_iter=1, num_heads=4)
NUM_CLASSES = 3


def config(max_iter: int = 4, **changes: object) -> TrainingConfig:
    values: dict = {
        "max_iter": max_iter,
        "images_per_batch": 2,
        "learning_rate": 1e-3,
        "warmup_iters": 0,
        "short_edge_pixels": (96,),
        "max_edge_pixels": 128,
        "skip_empty_images": False,
        "num_workers": 0,
        "checkpoint_period_iters": 2,
        "log_period_iters": 1,
        "evaluate_at": (),
        "device": "cpu",
    }
    return TrainingConfig(**{**values, **changes})


def coco_of_equal_images(folder: Path, *, num_images: int = 6, size: tuple[int, int] = (96, 128)) -> CocoDataset:
    """Images of noise of one size, so that batches are padded alike however they are shared out; two boxes each."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    height, width = size
    images, annotations = [], []
    for number in range(num_images):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        for _ in range(2):
            x, y = (int(v) for v in generator.integers(0, 28, 2))
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "bbox": [x, y, 40, 36], "area": 1440, "iscrowd": 0,
                    "category_id": int(generator.integers(1, NUM_CLASSES + 1)),
                }
            )  # fmt: skip
    categories = [{"id": i + 1, "name": str(i)} for i in range(NUM_CLASSES)]
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return read_coco(file, folder / "images")


def run(
    directory: Path,
    dataset: CocoDataset,
    settings: TrainingConfig,
    *,
    student: nn.Module | None = None,
    distiller: object = LGD,
) -> TrainingResult:
    return train(
        student or build_tiny_retinanet(num_classes=len(dataset.class_names)),
        distiller,
        settings,
        train_set=dataset,
        validation_set=dataset,
        output_directory=directory,
    )


def final(directory: Path) -> dict[str, Any]:
    return read_checkpoint(directory / FINAL_CHECKPOINT)


def tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in nested dicts and lists by dotted name."""
    if isinstance(state, Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {k: v for key, value in items for k, v in tensors(value, f"{name}.{key}").items()}


def differing(first: Any, second: Any) -> list[str]:
    """Names of the tensors that are not identical bit for bit."""
    a, b = tensors(first), tensors(second)
    assert a
    assert set(a) == set(b)
    return [name for name in a if not torch.equal(a[name], b[name])]
