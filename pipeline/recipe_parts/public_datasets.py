"""Lazy sections that follow from a public data set: where it lies, and what canvas its images need.

The folders are links or folders inside the project's own (``ln -s /data/coco datasets/coco``); files elsewhere are
given as ``dataset.train=… dataset.validation=…``.

    datasets/coco/annotations/instances_{train,val}2017.json     datasets/coco/{train,val}2017/*.jpg
    datasets/VOCdevkit/VOC{2007,2012}/{Annotations,ImageSets,JPEGImages}
    datasets/crowdhuman/annotation_{train,val}.odgt              datasets/crowdhuman/Images/*.jpg
"""

from __future__ import annotations

from typing import Any

from detectron2.config import LazyCall as L

from export.config import ExportConfig
from training.dataset_config import DatasetConfig


def coco() -> Any:
    """COCO 2017; two boxes of its training set have no height and are left out."""
    return L(DatasetConfig)(
        train="datasets/coco/annotations/instances_train2017.json",
        validation="datasets/coco/annotations/instances_val2017.json",
        drop_degenerate_boxes=True,
    )


def voc() -> Any:
    """Pascal VOC: trained on ``trainval`` of 2007 and 2012, evaluated on ``test`` of 2007."""
    return L(DatasetConfig)(
        format="voc",
        train="datasets/VOCdevkit/VOC2007:trainval,datasets/VOCdevkit/VOC2012:trainval",
        validation="datasets/VOCdevkit/VOC2007:test",
    )


def crowdhuman() -> Any:
    """CrowdHuman's full-body boxes; any that lies wholly outside its image is left out."""
    return L(DatasetConfig)(
        format="crowdhuman",
        train="datasets/crowdhuman/annotation_train.odgt",
        validation="datasets/crowdhuman/annotation_val.odgt",
        drop_degenerate_boxes=True,
    )


def export_800(*, max_edge_pixels: int = 1333) -> Any:
    """Images at short edge 800, as published APs are measured, on the smallest landscape canvas that holds them.

    A portrait is scaled down to fit it. ``export.canvas=[1344,1344]`` keeps portraits as large, at 1.7 times the work.
    """
    return L(ExportConfig)(
        canvas=[800, -(-max_edge_pixels // 32) * 32],
        short_edge_pixels=800,
        max_edge_pixels=max_edge_pixels,
        max_batch_size=4,
    )
