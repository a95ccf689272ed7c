"""AP of a detectron2 model, evaluated the ordinary way: detectron2's loader, preprocessing and evaluator."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import torch
from detectron2.data import build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from torch import nn
from torch.utils.data import DataLoader

from training.dataset import CheckedMapper, CocoDataset, detectron2_dicts, register_with_detectron2
from training.dataset_metrics import dataset_metrics
from training.mask_annotations import has_mask_head, mask_format

RESULTS_FILE = "coco_instances_results.json"
_REPORTED = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def evaluate_detector(
    detector: nn.Module,
    dataset: CocoDataset,
    *,
    short_edge_pixels: int,
    max_edge_pixels: int,
    output_directory: Path,
    keep_labels: bool = False,
) -> dict[str, float]:
    """COCO box AP in percent (``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``) of ``detector`` on ``dataset``.

    A detector with a mask head also has ``segm_AP`` and so on, of its masks. The detections are left in
    ``output_directory`` in COCO's results format, boxes XYWH in original image pixels. A model without any detection
    has AP 0. With ``keep_labels`` each input carries its ground truth as ``instances``.
    :func:`training.dataset_metrics.dataset_metrics` adds what the data set's own field measures.
    """
    name = f"evaluated-{dataset.annotation_file.stem}"
    register_with_detectron2(name, dataset)
    loader = inference_loader(detector, dataset, short_edge_pixels, max_edge_pixels, keep_labels=keep_labels)
    was_training = detector.training
    tasks = {"bbox": "", "segm": "segm_"} if has_mask_head(detector) else {"bbox": ""}
    # pycocotools and the evaluator print tables; the caller reports.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOEvaluator(
            name, tasks=tuple(tasks), distributed=False, output_dir=str(output_directory), use_fast_impl=False
        )
        results = inference_on_dataset(detector.eval(), loader, evaluator)
    detector.train(was_training)
    scores = {f"{prefix}{key}": _or_zero(results[task][key]) for task, prefix in tasks.items() for key in _REPORTED}
    return scores | dataset_metrics(dataset, json.loads((output_directory / RESULTS_FILE).read_text()))


def inference_loader(
    detector: nn.Module,
    dataset: CocoDataset,
    short_edge_pixels: int,
    max_edge_pixels: int,
    *,
    keep_labels: bool = False,
) -> DataLoader:
    """detectron2's test loader: one image a batch, in the order of the annotation file."""
    records = detectron2_dicts(dataset)
    mapper = CheckedMapper(
        is_train=keep_labels,  # all that it changes is that annotations are kept
        augmentations=[T.ResizeShortestEdge(short_edge_pixels, max_edge_pixels)],
        image_format=detector.input_format,
        use_instance_mask=keep_labels and has_mask_head(detector),
        instance_mask_format=mask_format(records),
    )
    return build_detection_test_loader(dataset=records, mapper=mapper, num_workers=0)


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else float(value)


class DeviceUnavailable(RuntimeError):
    """The recipe asks for a GPU, or for what only a GPU can do, and there is none."""

    exit_code = 4


def resolve_device(device: str) -> torch.device:
    """``"auto"`` to the GPU where there is one, else the CPU.

    Raises:
        DeviceUnavailable: ``"cuda"`` without a usable GPU.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise DeviceUnavailable(
            "training.device=cuda, but torch finds no usable NVIDIA GPU on this machine; use training.device=auto or "
            "cpu, or check the driver with nvidia-smi"
        )
    return torch.device("cuda" if has_gpu and device != "cpu" else "cpu")
