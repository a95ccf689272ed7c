"""AP through the implicit teacher's features, labels given: the sanity check that it knows more than the student.

It is never a deployable model, for it reads the answers. A teacher that is not far ahead of its student has nothing to
teach: its labels, masks or coordinates are wrong, or it was not trained long enough.

Shape legend: N images, features ``{level: (N, C, Hl, Wl)}``.
"""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import Any

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from training.dataset import CocoDataset
from training.distilled_detector import DistilledDetector
from training.evaluate import evaluate_detector


def has_teacher(detector: DistilledDetector) -> bool:
    """Whether the distiller makes features from labels."""
    return hasattr(detector.distiller, "teacher_features")


def evaluate_teacher(
    detector: DistilledDetector,
    dataset: CocoDataset,
    *,
    short_edge_pixels: int,
    max_edge_pixels: int,
    output_directory: Path,
) -> dict[str, float]:
    """COCO AP in percent of the student's head on the implicit teacher's features, as ``evaluate_detector`` gives it.

    The label encoder sees all ground truth but crowd regions. Each image is a batch of its own.
    """
    return evaluate_detector(
        _LabelledTeacher(detector),
        dataset,
        short_edge_pixels=short_edge_pixels,
        max_edge_pixels=max_edge_pixels,
        output_directory=output_directory,
        keep_labels=True,
    )


class _LabelledTeacher(nn.Module):
    """Takes detectron2 inputs with ``instances`` and detects on the teacher's features."""

    def __init__(self, detector: DistilledDetector) -> None:
        super().__init__()
        self._detector = detector
        self.input_format = detector.student.input_format
        if hasattr(detector.student, "roi_heads"):
            self.roi_heads = detector.student.roi_heads  # says whether masks are to be read and evaluated

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        student, distiller = self._detector.student, self._detector.distiller
        images = student.preprocess_image(batched_inputs)
        features = student.backbone(images.tensor)
        labels = [x["instances"].to(images.device) for x in batched_inputs]
        teacher = distiller.teacher_features(
            {level: features[level] for level in distiller.level_names}, labels, tuple(images.tensor.shape[-2:])
        )
        found = detections_from_features(student, images, {**features, **teacher})
        return [
            {"instances": detector_postprocess(result, given.get("height", size[0]), given.get("width", size[1]))}
            for result, given, size in zip(found, batched_inputs, images.image_sizes, strict=True)
        ]


@singledispatch
def detections_from_features(detector: nn.Module, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
    """What a detector in eval mode finds on given features, in pixels of the batch: the counterpart of
    :func:`training.detection_losses.detection_losses`."""
    raise TypeError(f"no detections from given features for {type(detector).__name__}")


@detections_from_features.register
def _dense(detector: DenseDetector, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
    levels = [features[name] for name in detector.head_in_features]
    return detector.forward_inference(images, levels, detector.head(levels))


@detections_from_features.register
def _two_stage(detector: GeneralizedRCNN, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
    proposals, _ = detector.proposal_generator(images, features, None)
    found, _ = detector.roi_heads(images, features, proposals, None)
    return found
