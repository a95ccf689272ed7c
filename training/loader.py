"""The training loader: an endless, shuffled stream of augmented images that any process can pick up anywhere.

Images are drawn one by one, and a draw's number decides everything about it: which image it is and how it is augmented.
So what is trained on depends neither on the number of processes or loader workers nor on interruptions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.data import transforms as T
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from training.config import TrainingConfig
from training.dataset import CheckedMapper, CocoDataset, detectron2_dicts
from training.mask_annotations import has_mask_head, mask_format

_ORDER, _AUGMENTATION, _STEP = range(3)  # what a random number is for, so that no two of them share a seed


class TrainingInputError(ValueError):
    """The data set leaves nothing to train on."""

    exit_code = 2


def training_loader(student: nn.Module, config: TrainingConfig, dataset: CocoDataset, *, start_iter: int) -> DataLoader:
    """Lists of detectron2 inputs, one part of this process's share of a batch each, from ``start_iter`` on.

    Raises:
        TrainingInputError: no image is left to train on.
    """
    records = detectron2_dicts(dataset)
    if config.skip_empty_images:
        records = [r for r in records if any(not a.get("iscrowd", 0) for a in r["annotations"])]
    if not records:
        raise TrainingInputError(
            f"{dataset.annotation_file}: no image has an object, so training.skip_empty_images leaves nothing to "
            "train on"
        )
    resize = T.ResizeShortestEdge(config.short_edge_pixels, config.max_edge_pixels, "choice")
    mapper = CheckedMapper(
        is_train=True,
        augmentations=[resize, T.RandomFlip()],
        image_format=student.input_format,
        use_instance_mask=has_mask_head(student),
        instance_mask_format=mask_format(records),
    )
    return DataLoader(
        DrawnImages(DatasetFromList(records, copy=False), mapper, config.seed),
        sampler=Draws(len(records), seed=config.seed, first=start_iter * config.images_per_batch),
        batch_size=config.images_per_batch // (comm.get_world_size() * config.accumulate_batches),
        num_workers=config.num_workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available() and config.device != "cpu",
    )


class Draws(Sampler):
    """Numbers of this process's draws and the index of the image each of them draws, without end.

    Every pass over the data set has an order of its own, which follows from the seed and the number of the pass. Of W
    processes process r makes the draws r, r + W, r + 2 W, …

    Args:
        size: number of images.
        first: number of the first draw of all processes.
    """

    def __init__(self, size: int, *, seed: int, first: int) -> None:
        self._size, self._seed, self._first = size, seed, first

    def __iter__(self) -> Iterator[tuple[int, int]]:
        draw, order_of, order = self._first + comm.get_rank(), -1, torch.empty(0)
        while True:
            pass_number, position = divmod(draw, self._size)
            if pass_number != order_of:
                generator = torch.Generator().manual_seed(_mixed(_ORDER, self._seed, pass_number))
                order_of, order = pass_number, torch.randperm(self._size, generator=generator)
            yield draw, int(order[position])
            draw += comm.get_world_size()


class DrawnImages(Dataset):
    """The mapped image of a draw, augmented as the draw's number says."""

    def __init__(self, records: DatasetFromList, mapper: CheckedMapper, seed: int) -> None:
        self._records, self._mapper, self._seed = records, mapper, seed

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, drawn: tuple[int, int]) -> dict[str, Any]:
        draw, index = drawn
        _seed_all(_mixed(_AUGMENTATION, self._seed, draw))
        mapped: dict[str, Any] = self._mapper(self._records[index])
        return mapped


def seed_forward(seed: int, number: int) -> None:
    """Start the random numbers of one forward pass (drop path, sampling of proposals) from its number in the run.

    Each process gets other numbers. Nothing has to be saved for a run that goes on after an interruption.
    """
    _seed_all(_mixed(_STEP, seed, number, comm.get_rank()))


def _seed_all(number: int) -> None:
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def _mixed(*numbers: int) -> int:
    """One well-mixed number in [0, 2^63) from several."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _as_it_is(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return batch
