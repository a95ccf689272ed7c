"""Which keys of an evaluation are metrics, and how the ones beyond COCO's box metrics are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
# AP of each class (``AP-cat``) is not meant: the classes have a table of their own.
_METRIC_KEY = re.compile(r"(?:[A-Za-z]+_)?(?:m?AP|AR|m?MR|JI|recall)[0-9a-z]*(?:_area)?")
_LABELS = {"mMR": "MR⁻²", "JI": "Jaccard index", "AP50_area": "AP50, area under curve"}
_PREFIXES = {"segm_": "mask ", "bbox_": "box ", "VOC_": "VOC ", "CrowdHuman_": "CrowdHuman "}
_LOWER_IS_BETTER = ("mMR", "MR")


def is_metric(key: str) -> bool:
    """True for the key of a metric, in per cent, such as ``AP50``, ``segm_AP`` or ``mMR``."""
    return _METRIC_KEY.fullmatch(key) is not None


def metrics_of(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of an evaluation: COCO's box metrics first, None for each that is missing, then what it has more."""
    extra = {key: value for key, value in evaluation.items() if is_metric(key) and key not in METRICS}
    return {key: _number(value) for key, value in ({key: evaluation.get(key) for key in METRICS} | extra).items()}


def extra_metrics(evaluations: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The metrics beyond COCO's box metrics that any of the evaluations has, with what a table has to know of them."""
    keys = dict.fromkeys(
        key
        for evaluation in evaluations
        for key, value in evaluation.items()
        if is_metric(key) and key not in METRICS and _number(value) is not None
    )
    return [{"key": key, "label": label_of(key), "lower_is_better": lower_is_better(key)} for key in keys]


def label_of(key: str) -> str:
    """What a table calls it: ``segm_AP50`` is *mask AP50*."""
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
    metric = key.removeprefix(prefix)
    direction = " (lower is better)" if lower_is_better(key) else ""
    return _PREFIXES.get(prefix, "") + _LABELS.get(metric, metric) + direction


def lower_is_better(key: str) -> bool:
    """True for miss rates."""
    return key.rpartition("_")[2] in _LOWER_IS_BETTER


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
