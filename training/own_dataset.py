"""A data set as the recipe names it, before the ``data`` stage makes it usable for detectron2 and pycocotools."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.coco_normalization import repaired_copy
from training.dataset import CocoDataset, add_images, dataset_digest, described


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnDataset:
    """A data set that was read and validated where it lies."""

    dataset: CocoDataset
    """Its numbers once usable, but still with the user's own ``annotation_file``; ``changes`` not empty: only
    :meth:`usable` gives what can be read."""
    document: Mapping[str, Any] | None = None
    """The annotations converted to COCO format; None: the file is in COCO format."""
    source_files: tuple[Path, ...] = ()
    """What ``document`` was converted from."""

    def digest(self, *, include_pixels: bool = False) -> str:
        """SHA-256 (hex) of the annotations' bytes and of each image's name and size, or bytes on request."""
        if self.document is None:
            return dataset_digest(self.dataset, include_pixels=include_pixels)
        digest = hashlib.sha256()
        for path in self.source_files:
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode())
            digest.update(content)
        add_images(digest, self.dataset.image_dir, self.document, include_pixels=include_pixels)
        return digest.hexdigest()

    def usable(self, path: Path) -> CocoDataset:
        """The data set that can be read: the user's own file, or where it needs changes a copy written to ``path``."""
        if self.document is not None:
            path.write_text(json.dumps(self.document), encoding="utf-8")
            return dataclasses.replace(self.dataset, annotation_file=path)
        return repaired_copy(self.dataset, path) if self.dataset.changes else self.dataset


def converted(
    document: Mapping[str, Any],
    image_dir: Path,
    *,
    named: Path,
    source_files: tuple[Path, ...],
    changes: tuple[str, ...],
    num_dropped: int,
) -> OwnDataset:
    """A data set in another format, converted to a COCO document.

    Args:
        named: the file that messages and reports name it by.
        changes: what the conversion did, in words; what was left out is added.
        num_dropped: number of boxes left out.

    Raises:
        DatasetError: the images lie where they may not, or the document is no valid COCO document.
    """
    left_out = (f"{num_dropped} boxes of zero area left out",) if num_dropped else ()
    dataset = dataclasses.replace(
        described(named, image_dir, document), num_dropped_boxes=num_dropped, changes=(*changes, *left_out)
    )
    return OwnDataset(dataset=dataset, document=document, source_files=source_files)
