"""The formats that a data set of one's own can have. A format is one function: recipe section to its two sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from training.coco_normalization import read_repairable
from training.crowdhuman_dataset import read_crowdhuman
from training.dataset_config import DatasetConfig
from training.own_dataset import OwnDataset
from training.voc_dataset import read_voc


def read_coco_format(config: DatasetConfig) -> dict[str, OwnDataset]:
    """The ``"train"`` and ``"validation"`` sets of two COCO annotation files."""
    named = {
        "train": (config.train, config.train_images),
        "validation": (config.validation, config.validation_images),
    }
    return {
        split: OwnDataset(
            dataset=read_repairable(
                Path(file or ""),
                None if images is None else Path(images),
                drop_degenerate_boxes=config.drop_degenerate_boxes,
            )
        )
        for split, (file, images) in named.items()
    }


FORMATS: Mapping[str, Callable[[DatasetConfig], dict[str, OwnDataset]]] = {
    "coco": read_coco_format,
    "voc": read_voc,
    "crowdhuman": read_crowdhuman,
}


def own_datasets(config: DatasetConfig) -> dict[str, OwnDataset]:
    """The user's ``"train"`` and ``"validation"`` sets, read and validated as the recipe names them.

    Raises:
        DatasetError: anything is missing or wrong; says what, where and what to do.
    """
    return FORMATS[config.format](config)
