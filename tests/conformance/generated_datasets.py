"""Small data sets of every format that a recipe can name, as the overrides that point a recipe at them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.training.small_datasets import write_crowdhuman, write_voc_set

SIZE = (128, 96)
NUM_IMAGES = 5
CLASS_NAMES = ("disc", "bar", "blob")


def overrides_for(dataset_format: str, folder: Path) -> list[str]:
    """A generated data set of ``"coco"``, ``"voc"`` or ``"crowdhuman"`` format, to train and to evaluate on."""
    named = {"coco": _write_coco, "voc": _write_voc, "crowdhuman": _write_crowdhuman}[dataset_format](folder)
    return [f"dataset.train={named}", f"dataset.validation={named}"]


def _write_voc(folder: Path) -> str:
    # One of the data set's boxes has no width, on purpose; its image is left out here.
    return write_voc_set(folder / "VOC2007", images=[0, 1, 2, 3, 5])


def _write_crowdhuman(folder: Path) -> str:
    return str(write_crowdhuman(folder))


def _write_coco(folder: Path) -> str:
    """Bright boxes on noise with polygons, some of which cover half of their box; one image has no object."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    width, height = SIZE
    annotations = []
    for number in range(1, NUM_IMAGES + 1):
        pixels = generator.integers(0, 80, (height, width, 3), dtype=np.uint8)
        for index in range(0 if number == NUM_IMAGES else 3):
            x, y = int(generator.integers(0, width - 60)), int(generator.integers(0, height - 50))
            w, h = int(generator.integers(16, 60)), int(generator.integers(16, 50))
            pixels[y : y + h, x : x + w, index] = 200
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": index + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h / (2 if index == 0 else 1),
                    "iscrowd": 0,
                    "segmentation": [corners[:6] if index == 0 else corners],
                }
            )
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    document = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
            for number in range(1, NUM_IMAGES + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASS_NAMES, start=1)],
    }
    (folder / "instances.json").write_text(json.dumps(document))
    return str(folder / "instances.json")
