"""What a data set's own field measures, beside COCO's metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.dataset import CocoDataset, parsed
from training.miss_rate import crowdhuman_metrics
from training.voc_metric import voc_metrics


def dataset_metrics(dataset: CocoDataset, results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of the data set's format in percent, or none for COCO format.

    Pascal VOC: ``VOC_AP``, ``VOC_AP50``, ``VOC_AP75``, ``VOC_AP50_area``. CrowdHuman: ``mMR``, of which lower is
    better, ``CrowdHuman_AP50``, ``CrowdHuman_recall``.

    Args:
        results: detections in COCO's results format, boxes (x, y, width, height) in image pixels, data set's
            category ids.
    """
    if dataset.metric == "coco":
        return {}
    document = parsed(dataset.annotation_file)
    if dataset.metric == "crowdhuman":
        return crowdhuman_metrics(document, results)
    return voc_metrics(document, results, use_11_points=dataset.metric == "voc2007")
