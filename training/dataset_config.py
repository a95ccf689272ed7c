"""Section ``dataset`` of a recipe: which data set is trained on and evaluated on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class DatasetError(ValueError):
    """The data set that a recipe names is missing or wrong; nothing was trained."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """A data set of one's own, in one of three formats, or without ``train`` the embedded one.

    ==========  =============================================  ==========================================
    format      ``train`` and ``validation``                   images
    ==========  =============================================  ==========================================
    coco        COCO annotation file                           beside it, or ``train_images``
    voc         ``FOLDER:IMAGE_SET``, several with commas      ``FOLDER/JPEGImages``
    crowdhuman  ``annotation_train.odgt``                      beside it, or ``train_images``
    ==========  =============================================  ==========================================

    The usual Pascal VOC split, trained on 2007 and 2012 and evaluated on the test set of 2007, is

        format="voc",
        train="/data/VOCdevkit/VOC2007:trainval,/data/VOCdevkit/VOC2012:trainval",
        validation="/data/VOCdevkit/VOC2007:test",
    """

    format: Literal["coco", "voc", "crowdhuman"] = "coco"
    """Of the data set of one's own. ``"voc"`` adds the VOC metric and ``"crowdhuman"`` MR⁻² to the COCO metrics."""
    train: str | None = None
    """What to train on, see the table."""
    validation: str | None = None
    """What to evaluate on; same format and classes. A model that was trained elsewhere needs no ``train`` beside it."""
    train_images: str | None = None
    """Image folder; None: looked for beside the annotation file."""
    validation_images: str | None = None
    classes: tuple[str, ...] | None = None
    """Class names of a ``"voc"`` set, in the order of their labels. None: the 20 of Pascal VOC when the training set
    names no other, otherwise the names found in the training set, sorted. An object of another class is an error."""
    num_train: int = 2000
    """Number of images of the embedded data set; of a data set of one's own all images are used."""
    num_validation: int = 400
    seed: int = 0
    digest_pixels: bool = False
    """Whether the data set's digest covers the images' bytes, not only their names and sizes."""
    drop_degenerate_boxes: bool = False
    """Whether boxes of zero width or height are left out; otherwise they are an error. COCO train2017 has two. Of a
    ``"crowdhuman"`` set also boxes wholly outside their image."""

    def __post_init__(self) -> None:
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(self.classes))
        if self.train is not None and self.validation is None:
            raise incomplete("train", "validation")
        if min(self.num_train, self.num_validation) < 1:
            raise DatasetError(
                f"dataset.num_train is {self.num_train} and dataset.num_validation {self.num_validation}: expected at "
                f"least 1 image each."
            )
        self._check_format()

    @property
    def is_embedded(self) -> bool:
        """Whether no data set of one's own is named."""
        return self.train is None and self.validation is None

    def _check_format(self) -> None:
        """Raise :class:`DatasetError` when other fields are given than the format has."""
        if self.format != "coco" and self.is_embedded:
            what = "FOLDER:IMAGE_SET" if self.format == "voc" else "FILE.odgt"
            raise DatasetError(
                f"dataset.format={self.format} and no data set: give dataset.train={what} and "
                f"dataset.validation={what}, or leave dataset.format out for the embedded data set."
            )
        for key, name in (("train", self.train), ("validation", self.validation)):
            if self.format == "coco" and name is not None and name.endswith(".odgt"):
                raise DatasetError(
                    f"dataset.{key}={name} is a CrowdHuman file and dataset.format is coco: give "
                    f"dataset.format=crowdhuman."
                )
        if self.format == "voc" and (self.train_images, self.validation_images) != (None, None):
            raise DatasetError(
                "dataset.train_images or dataset.validation_images is set and dataset.format is voc, whose images are "
                "in JPEGImages of the named folders: leave them out."
            )
        if self.classes is None:
            return
        if self.format != "voc":
            raise DatasetError(
                f"dataset.classes is set and dataset.format is {self.format}, whose files name the classes themselves: "
                f"leave dataset.classes out; only dataset.format=voc takes it."
            )
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise DatasetError(f"dataset.classes is {list(self.classes)}: expected one class or more, each once.")


def incomplete(given: str, missing: str) -> DatasetError:
    """One split of a data set is named and the other is not."""
    return DatasetError(
        f"dataset.{given} is set and dataset.{missing} is not: a data set of your own needs both annotation "
        f"files. Give dataset.{missing}=FILE too, or neither for the embedded data set."
    )
