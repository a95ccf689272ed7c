"""The formats that a data set of one's own can have. A format is one function: recipe section to its two sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from training.coco_normalization import read_repairable
from training.crowdhuman_dataset import read_crowdhuman
from training.dataset_config import DatasetConfig, incomplete
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
    if config.train is None:
        raise incomplete("validation", "train")
    return FORMATS[config.format](config)


def datasets_to_measure_on(config: DatasetConfig) -> dict[str, OwnDataset]:
    """The same for a model that was trained elsewhere: a training set only where the recipe names one.

    Raises:
        DatasetError: as :func:`own_datasets`.
    """
    if config.train is not None:
        return own_datasets(config)
    twice = dataclasses.replace(config, train=config.validation, train_images=config.validation_images)
    return {"validation": own_datasets(twice)["validation"]}
