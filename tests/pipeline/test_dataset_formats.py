"""Pascal VOC and CrowdHuman through the data stage, training with evaluation, and the accuracy table."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from conftest import build_tiny_retinanet
from rich.console import Console

from export.detector_graph import signature_of
from export.ladder import Rung
from export.parity import ParityConfig
from export.signature import Detections
from pipeline.accuracy import Ladder
from pipeline.artifact import Artifact, open_artifact
from pipeline.recipe import load
from pipeline.run import run_stages
from pipeline.stage import StageContext
from pipeline.stages import STAGES
from pipeline.training_stages import dataset_of
from tests.training.small_datasets import write_crowdhuman, write_voc_set
from training.config import TrainingConfig
from training.dataset import CocoDataset, DatasetError, detectron2_dicts
from training.dataset_formats import datasets_to_measure_on
from training.dataset_metrics import dataset_metrics
from training.distillers import LgdConfig
from training.evaluate import RESULTS_FILE
from training.train import AP_FILE, train

RECIPE = Path(__file__).with_name("tiny_recipe.py")
VOC_KEYS = {"VOC_AP", "VOC_AP50", "VOC_AP75", "VOC_AP50_area"}
CROWD_KEYS = {"mMR", "CrowdHuman_AP50", "CrowdHuman_recall"}


def voc(folder: Path) -> list[str]:
    sets = [write_voc_set(folder / year, images=images) for year, images in (("VOC2007", [0, 1]), ("VOC2012", [2, 4]))]
    test = write_voc_set(folder / "VOC2007", "test", images=[3, 5])
    return ["dataset.format=voc", f"dataset.train={','.join(sets)}", f"dataset.validation={test}"]


def crowdhuman(folder: Path) -> list[str]:
    files = {split: write_crowdhuman(folder, part) for split, part in (("train", "train"), ("validation", "val"))}
    return ["dataset.format=crowdhuman", *(f"dataset.{split}={file}" for split, file in files.items())]


def data_artifact(folder: Path, overrides: list[str], num_built: int = 1) -> tuple[Artifact, str]:
    output = io.StringIO()
    console = Console(file=output, soft_wrap=True)
    summary = run_stages(STAGES, load(RECIPE, overrides), folder / "run", console=console, until="data")
    assert summary.num_built == num_built
    return open_artifact(folder / "run" / "data"), output.getvalue()


Write = Callable[[Path], list[str]]


@pytest.mark.parametrize(
    ("write", "changed"),
    [
        (voc, "VOC2012/Annotations/000003.xml"),
        (voc, "VOC2007/JPEGImages/000001.jpg"),
        (crowdhuman, "annotation_train.odgt"),
    ],
)
def test_the_data_stage_converts_and_a_changed_source_runs_it_again(tmp_path: Path, write: Write, changed: str) -> None:
    overrides = write(tmp_path)
    artifact, output = data_artifact(tmp_path, overrides)
    assert "data: train reads a copy of the annotation file: converted from" in output
    assert set(artifact.manifest.files) == {"instances_train.json", "instances_validation.json"}
    facts = artifact.manifest.facts
    assert facts["train"]["digest"] == artifact.manifest.inputs["train"]
    assert dataset_of(artifact, "train").num_boxes == facts["train"]["num_boxes"]
    data_artifact(tmp_path, overrides, num_built=0)

    source = tmp_path / changed
    source.write_bytes(source.read_bytes() + b"\n")
    again, _ = data_artifact(tmp_path, overrides)
    assert again.manifest.inputs["train"] != artifact.manifest.inputs["train"]


def test_a_wrong_source_stops_the_data_stage(tmp_path: Path) -> None:
    overrides = voc(tmp_path)
    (tmp_path / "VOC2012" / "Annotations" / "000003.xml").unlink()
    with pytest.raises(DatasetError, match=r"000003\.xml: there is no such annotation file"):
        data_artifact(tmp_path, overrides)


@pytest.mark.parametrize("write", [voc, crowdhuman])
def test_a_training_needs_both_sets_and_a_measurement_only_one(tmp_path: Path, write: Write) -> None:
    overrides = write(tmp_path)
    both = datasets_to_measure_on(load(RECIPE, overrides).sections["dataset"])
    alone = [override for override in overrides if not override.startswith("dataset.train=")]
    config = load(RECIPE, alone).sections["dataset"]
    with pytest.raises(DatasetError, match=r"dataset\.validation is set and dataset\.train is not"):
        data_artifact(tmp_path, alone)
    only = datasets_to_measure_on(config)
    assert (set(both), set(only)) == ({"train", "validation"}, {"validation"})
    assert only["validation"].dataset.num_boxes == both["validation"].dataset.num_boxes


def test_classes_are_named_on_the_command_line(tmp_path: Path) -> None:
    artifact, _ = data_artifact(tmp_path, [*voc(tmp_path), "dataset.classes=[person,dog,cat]"])
    assert dataset_of(artifact, "train").class_names == ("person", "dog", "cat")


@pytest.mark.parametrize(("write", "keys"), [(voc, VOC_KEYS), (crowdhuman, CROWD_KEYS)])
def test_training_measures_what_the_field_measures(tmp_path: Path, write: Write, keys: set[str]) -> None:
    artifact, _ = data_artifact(tmp_path, write(tmp_path))
    datasets = {split: dataset_of(artifact, split) for split in ("train", "validation")}
    config = TrainingConfig(
        max_iter=2,
        images_per_batch=2,
        learning_rate=1e-3,
        warmup_iters=0,
        short_edge_pixels=(64,),
        max_edge_pixels=128,
        num_workers=0,
        log_period_iters=1,
        evaluate_at=(1.0,),
        device="cpu",
    )
    student = build_tiny_retinanet(num_classes=len(datasets["train"].class_names))
    student.test_score_thresh = 0.005
    result = train(
        student,
        LgdConfig(distill_from_iter=1, freeze_backbone_until_iter=0, num_heads=4),
        config,
        train_set=datasets["train"],
        validation_set=datasets["validation"],
        output_directory=tmp_path,
    )
    written = json.loads((tmp_path / AP_FILE).read_text())
    assert written == result.ap_curve
    detections = json.loads((tmp_path / "evaluation" / RESULTS_FILE).read_text())
    assert len(detections) > 0
    measured = dataset_metrics(datasets["validation"], detections)
    assert set(measured) == keys
    assert {key: written[-1][key] for key in keys} == measured


def perfect(dataset: CocoDataset) -> list[Detections]:
    """The objects of each image as detections, in the order of the annotation file."""
    found = []
    for record in detectron2_dicts(dataset):
        entries = [entry for entry in record["annotations"] if not entry["iscrowd"]]
        boxes = np.array([entry["bbox"] for entry in entries], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([entry["category_id"] for entry in entries], np.int32)
        found.append(Detections(boxes=boxes, scores=np.ones(len(boxes), np.float32), labels=labels))
    return found


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (voc, dict.fromkeys(VOC_KEYS, 100.0)),
        (crowdhuman, {"mMR": 0.0, "CrowdHuman_recall": 100.0}),
    ],
)
def test_the_accuracy_table_has_the_metrics_of_the_format(
    tmp_path: Path, write: Write, expected: dict[str, float]
) -> None:
    artifact, _ = data_artifact(tmp_path, write(tmp_path))
    dataset = dataset_of(artifact, "validation")
    signature = signature_of(
        build_tiny_retinanet(num_classes=len(dataset.class_names)),
        canvas=(128, 128),
        short_edge=64,
        max_edge=128,
        class_names=dataset.class_names,
        category_ids=dataset.category_ids,
        max_batch_size=1,
    )
    context = cast(StageContext, SimpleNamespace(directory=tmp_path, command="make"))
    ladder = Ladder(dataset, signature, context, ParityConfig())
    list(ladder.canvases())
    sides = [sorted((record["height"], record["width"])) for record in detectron2_dicts(dataset)]
    scales = [min(64 / short, 128 / long) for short, long in sides]
    on_canvas = [
        Detections(boxes=found.boxes * np.float32(scale), scores=found.scores, labels=found.labels)
        for found, scale in zip(perfect(dataset), scales, strict=True)
    ]
    ladder.add(Rung(name="runner"), on_canvas, artifact.path("instances_train.json"))
    row: dict[str, Any] = ladder.rows[0]
    assert {key: row[key] for key in expected} == pytest.approx(expected, abs=1e-3)
