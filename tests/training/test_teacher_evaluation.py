from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import build_tiny_retinanet
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from tests.training.tiny_detectors import DETECTORS, batch, labelled
from training.dataset import CocoDataset, read_coco
from training.detection_losses import distilled_levels
from training.distilled_detector import DistilledDetector
from training.distillers import LgdConfig, NoDistillerConfig
from training.embedded_dataset import generate
from training.evaluate import evaluate_detector
from training.schedule import DistillationSchedule
from training.teacher_evaluation import detections_from_features, evaluate_teacher, has_teacher


@pytest.fixture(scope="module")
def validation_set(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return read_coco(generate(tmp_path_factory.mktemp("data"), num_train=1, num_validation=4)[1])


@pytest.mark.parametrize("family", DETECTORS)
def test_on_its_own_features_a_detector_finds_what_its_own_forward_finds(family: str) -> None:
    detector = DETECTORS[family]().eval()
    inputs = batch(labelled(), labelled())
    with torch.inference_mode():
        expected = [found["instances"] for found in detector(inputs)]
        images = detector.preprocess_image(inputs)
        found = detections_from_features(detector, images, detector.backbone(images.tensor))
    assert len(found) == len(expected)
    for ours, stock in zip(found, expected, strict=True):
        assert torch.equal(ours.scores, stock.scores)
        assert torch.equal(ours.pred_classes, stock.pred_classes)
        assert torch.equal(ours.pred_boxes.tensor, stock.pred_boxes.tensor)


class Recorder(nn.Module):
    """A distiller that hands the student's features through, or zeros, and keeps the labels that it saw."""

    def __init__(self, level_names: tuple[str, ...], *, keep: bool) -> None:
        super().__init__()
        self.level_names, self.keep = level_names, keep
        self.seen: list[Instances] = []

    def teacher_features(
        self, features: dict[str, Tensor], labels: list[Instances], padded_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        self.seen += labels
        return {level: x if self.keep else torch.zeros_like(x) for level, x in features.items()}


def with_recorder(num_classes: int, *, keep: bool) -> DistilledDetector:
    student = build_tiny_retinanet(num_classes=num_classes)
    nn.init.constant_(student.head.cls_score.bias, 0.0)  # so that there are detections to compare
    return DistilledDetector(student, Recorder(distilled_levels(student), keep=keep), DistillationSchedule())


def test_a_teacher_that_changes_nothing_has_the_students_detections_and_sees_every_label(
    validation_set: CocoDataset, tmp_path: Path
) -> None:
    sizes = {"short_edge_pixels": 96, "max_edge_pixels": 128}
    detector = with_recorder(len(validation_set.class_names), keep=True)
    detector.train()
    evaluate_detector(detector.student, validation_set, output_directory=tmp_path / "student", **sizes)
    evaluate_teacher(detector, validation_set, output_directory=tmp_path / "teacher", **sizes)
    of_student, of_teacher = (next((tmp_path / who).glob("*results.json")) for who in ("student", "teacher"))
    assert of_student.read_text() == of_teacher.read_text()
    assert sum(len(labels) for labels in detector.distiller.seen) == validation_set.num_boxes
    assert detector.training
    assert detector.student.training


def test_what_the_teacher_makes_is_what_the_head_reads(validation_set: CocoDataset, tmp_path: Path) -> None:
    detector = with_recorder(len(validation_set.class_names), keep=False)
    sizes = {"short_edge_pixels": 96, "max_edge_pixels": 128}
    evaluate_detector(detector.student, validation_set, output_directory=tmp_path / "student", **sizes)
    evaluate_teacher(detector, validation_set, output_directory=tmp_path / "teacher", **sizes)
    of_student, of_teacher = (next((tmp_path / who).glob("*results.json")) for who in ("student", "teacher"))
    assert of_student.read_text() != of_teacher.read_text()


def test_only_a_distiller_that_makes_features_has_a_teacher() -> None:
    student = build_tiny_retinanet(num_classes=3)
    built = {"channels": 16, "num_classes": 3, "level_names": ("p3",)}
    lgd = LgdConfig(distill_from_iter=0, freeze_backbone_until_iter=0, num_heads=4).build(**built)
    assert has_teacher(DistilledDetector(student, lgd, DistillationSchedule()))
    assert not has_teacher(DistilledDetector(student, NoDistillerConfig().build(**built), DistillationSchedule()))


def test_an_unknown_detector_is_refused() -> None:
    with pytest.raises(TypeError, match="no detections from given features for Linear"):
        detections_from_features(nn.Linear(1, 1), ImageList(torch.zeros(1, 3, 8, 8), [(8, 8)]), {})
