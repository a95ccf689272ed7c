"""COCO-format data sets: read and validate one, digest it, hand it to detectron2.

``read_coco`` looks at the annotation file and at the names of the images, never at pixels, so COCO's 118,000 images
take seconds; ``check_readable`` is what decodes. Boxes are COCO's x, y, width, height in pixels of the image file.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from training import coco_validation
from training.dataset_config import DatasetConfig as DatasetConfig
from training.dataset_config import DatasetError as DatasetError

_SMALL_BOX_AREA = 32**2
_METRICS = ("voc2007", "voc", "crowdhuman")
_MAX_MESSAGES = 3


class UnusableImageError(DatasetError):
    """An image is damaged or of another size than the annotation file says, found while it was being used."""

    def __init__(self, message: str) -> None:
        # A worker's exception is raised again in the training process with the worker's traceback as its message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


@dataclass(frozen=True, kw_only=True)
class CocoDataset:
    """A validated COCO-format data set."""

    annotation_file: Path
    image_dir: Path
    class_names: tuple[str, ...]
    """In the order of ``category_ids``: the contiguous class indices 0, 1, …"""
    category_ids: tuple[int, ...]
    """Ascending, as detectron2 orders them."""
    num_images: int
    num_boxes: int
    """Without crowd regions."""
    num_empty_images: int
    """Images without any annotation."""
    num_crowd_boxes: int
    objects_per_image: float
    """Mean number of boxes of the images that have one."""
    share_small: float
    """Share of boxes with width × height below 32² pixels of the file."""
    num_dropped_boxes: int = 0
    """Boxes of the user's file that are left out; no other number here counts them."""
    changes: tuple[str, ...] = ()
    """What the copy that detectron2 and pycocotools read changes of the user's file; empty: they read the file."""
    metric: str = "coco"
    """What is measured beside COCO's metrics: ``"voc2007"``, ``"voc"`` or ``"crowdhuman"``; ``"coco"``: nothing."""


def read_coco(annotation_file: Path, image_dir: Path | None = None) -> CocoDataset:
    """Read and validate a COCO-format data set, usable as it is, without decoding an image.

    :func:`training.coco_normalization.read_repairable` also takes a file that has to be repaired first.

    Args:
        annotation_file: COCO JSON with ``images``, ``annotations`` and ``categories``.
        image_dir: folder that the ``file_name`` entries are relative to. None: the first of ``images``,
            ``../<file stem without instances_>``, ``../images`` and the annotation file's own folder that has the
            first image.

    Raises:
        DatasetError: if anything is missing or wrong; says what, where and what to do.
    """
    annotation_file = Path(os.path.abspath(annotation_file))
    document = parsed(annotation_file)
    raise_if_any(annotation_file, coco_validation.encoding_problems(annotation_file))
    raise_if_any(annotation_file, coco_validation.annotation_id_problems(document["annotations"]))
    return described(annotation_file, image_dir, document)


def described(annotation_file: Path, image_dir: Path | None, document: Mapping[str, Any]) -> CocoDataset:
    """The data set of a parsed annotation file, with everything validated but the ids of its annotations."""
    categories, images, annotations = (document[key] for key in ("categories", "images", "annotations"))
    raise_if_any(annotation_file, coco_validation.category_problems(categories))
    raise_if_any(annotation_file, coco_validation.image_problems(images))
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    raise_if_any(
        annotation_file, coco_validation.annotation_problems(annotations, {entry["id"] for entry in categories}, sizes)
    )
    if image_dir is None:
        split = annotation_file.stem.removeprefix("instances_")
        places = ["images", f"../{split}", "../images", "."]
        image_dir = found_image_dir(annotation_file, images[0]["file_name"], places)
    image_dir = Path(os.path.abspath(image_dir))
    raise_if_any(annotation_file, coco_validation.file_problems(image_dir, [image["file_name"] for image in images]))

    boxes = [entry for entry in annotations if not entry["iscrowd"]]
    num_small = sum(entry["bbox"][2] * entry["bbox"][3] < _SMALL_BOX_AREA for entry in boxes)
    categories = sorted(categories, key=lambda entry: entry["id"])
    return CocoDataset(
        annotation_file=annotation_file,
        image_dir=image_dir,
        class_names=tuple(entry["name"] for entry in categories),
        category_ids=tuple(entry["id"] for entry in categories),
        num_images=len(images),
        num_boxes=len(boxes),
        num_empty_images=len(images) - len({entry["image_id"] for entry in annotations}),
        num_crowd_boxes=len(annotations) - len(boxes),
        objects_per_image=len(boxes) / max(1, len({entry["image_id"] for entry in boxes})),
        share_small=num_small / max(1, len(boxes)),
        metric=document["metric"] if document.get("metric") in _METRICS else "coco",
    )


def check_same_classes(train: CocoDataset, validation: CocoDataset) -> None:
    """Raise :class:`DatasetError` unless both data sets have the same category ids and names."""
    expected, found = (dict(zip(each.category_ids, each.class_names, strict=True)) for each in (train, validation))
    if expected != found:
        different = sorted(set(expected.items()) ^ set(found.items()))[:_MAX_MESSAGES]
        raise DatasetError(
            f"{validation.annotation_file} has other categories than {train.annotation_file}: found {len(found)}, "
            f"expected {len(expected)}, the same ids with the same names; they differ first in {different}. A detector "
            f"is evaluated on the classes it was trained on: give both files one list of categories."
        )


def dataset_digest(dataset: CocoDataset, *, include_pixels: bool = False) -> str:
    """SHA-256 (hex) of the annotation file's bytes and of each image's name and size, or bytes on request."""
    annotation_bytes = dataset.annotation_file.read_bytes()
    digest = hashlib.sha256(annotation_bytes)
    add_images(digest, dataset.image_dir, json.loads(annotation_bytes), include_pixels=include_pixels)
    return digest.hexdigest()


def add_images(digest: hashlib._Hash, image_dir: Path, document: Mapping[str, Any], *, include_pixels: bool) -> None:
    """Feed a COCO document's image files to a digest: each one's name and size, and its bytes on request."""
    for file_name in sorted(image["file_name"] for image in document["images"]):
        path = image_dir / file_name
        digest.update(f"\n{file_name} {path.stat().st_size}".encode())
        if include_pixels:
            digest.update(path.read_bytes())


def detectron2_dicts(dataset: CocoDataset) -> list[dict[str, Any]]:
    """The data set in detectron2's standard format, in the order of the annotation file; labels are contiguous."""
    document = parsed(dataset.annotation_file)
    class_indices = {category_id: index for index, category_id in enumerate(dataset.category_ids)}
    records: dict[int, dict[str, Any]] = {}
    for image in document["images"]:
        records[image["id"]] = {
            "file_name": str(dataset.image_dir / image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
    for entry in document["annotations"]:
        record = records[entry["image_id"]]
        instance = {
            "bbox": entry["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": class_indices[entry["category_id"]],
            "iscrowd": int(entry["iscrowd"]),
        }
        segmentation = coco_validation.usable_segmentation(entry.get("segmentation"), record["height"], record["width"])
        if segmentation is not None:
            instance["segmentation"] = segmentation
        record["annotations"].append(instance)
    return list(records.values())


class CheckedMapper(DatasetMapper):
    """detectron2's mapper; an image that it cannot use is a :class:`DatasetError` that names the file."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        try:
            return super().__call__(dataset_dict)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            image = {"id": dataset_dict["image_id"], **dataset_dict}
            problem = coco_validation.pixel_problem(Path(dataset_dict["file_name"]).parent, image)
            if problem is None:
                raise
            raise UnusableImageError(problem) from error


def register_with_detectron2(name: str, dataset: CocoDataset) -> None:
    """Make the data set known to detectron2's catalogues; a data set already registered as ``name`` is replaced."""
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: detectron2_dicts(dataset))
    MetadataCatalog.get(name).set(
        thing_classes=list(dataset.class_names),
        thing_dataset_id_to_contiguous_id={category_id: i for i, category_id in enumerate(dataset.category_ids)},
        json_file=str(dataset.annotation_file),
        image_root=str(dataset.image_dir),
        evaluator_type="coco",
    )


def check_readable(dataset: CocoDataset, *, max_images: int = 5000, named: Path | None = None) -> int:
    """Decode the first ``max_images`` images and compare their sizes with the annotation file's.

    Args:
        named: the user's own file, for messages, where ``dataset`` is a copy of it.

    Returns:
        The number of images decoded.

    Raises:
        DatasetError: if a file is damaged, no image, gigantic, or of another size than the annotation file says.
    """
    images = parsed(dataset.annotation_file)["images"][:max_images]
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        # Gigantic images only warn up to twice Pillow's limit. The filter belongs to the process, not to a thread.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        problems = list(pool.map(lambda image: coco_validation.pixel_problem(dataset.image_dir, image), images))
    raise_if_any(named or dataset.annotation_file, (problem for problem in problems if problem is not None))
    return len(images)


def raise_if_any(annotation_file: Path, problems: Iterator[str]) -> None:
    """Raise :class:`DatasetError` with the first problems and the number of the others."""
    first = list(islice(problems, _MAX_MESSAGES))
    if first:
        num_more = sum(1 for _ in problems)
        more = f" And {num_more} more like this." if num_more else ""
        raise DatasetError(f"{annotation_file}: {' '.join(first)}{more}")


def parsed(annotation_file: Path) -> dict[str, Any]:
    """The parsed annotation file, with its three lists present."""
    if not annotation_file.is_file():
        raise DatasetError(
            f"{annotation_file}: there is no such annotation file. Expected a COCO JSON file; check dataset.train and "
            f"dataset.validation, or leave both out for the embedded data set. Pascal VOC and CrowdHuman sets need "
            f"dataset.format=voc or crowdhuman."
        )
    try:
        document = json.loads(annotation_file.read_bytes())
    except ValueError as error:
        raise DatasetError(
            f"{annotation_file}: not valid JSON ({error}). Expected a COCO annotation file; if it was downloaded or "
            f"copied, it may be cut off: fetch it again."
        ) from error
    raise_if_any(annotation_file, coco_validation.structure_problems(document))
    return document


def found_image_dir(annotation_file: Path, first_file_name: str, places: Sequence[str]) -> Path:
    """The first of the usual image folders, relative to the annotation file's, that holds the first image.

    Raises:
        DatasetError: none does.
    """
    candidates = [Path(os.path.normpath(annotation_file.parent / place)) for place in places]
    for candidate in candidates:
        if (candidate / first_file_name).is_file():
            return candidate
    tried = ", ".join(str(candidate) for candidate in candidates)
    raise DatasetError(
        f"{annotation_file}: its first image {first_file_name!r} is in none of the folders looked in: {tried}. Name "
        f"the image folder with dataset.train_images=FOLDER or dataset.validation_images=FOLDER."
    )
