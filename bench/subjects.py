"""The detectors that `bench/export.py` times: a run's student, and model-zoo configurations with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from detectron2.utils.analysis import FlopCountAnalysis
from model_zoo import stock_detector
from torch import nn

from export.detector_graph import signature_of
from export.signature import DetectorSignature
from pipeline import recipe as recipes
from pipeline.artifact import open_artifact
from pipeline.training_stages import STUDENT_CHECKPOINT, dataset_of
from serving.preprocessing import canvas_from_image, read_image
from tests.calibration import calibrate
from tests.export import conftest
from training.checkpoint import load_student
from training.dataset import CocoDataset, detectron2_dicts
from training.student import build_student

ZOO_BATCH = 4
NUM_CANVASES, NUM_CALIBRATION = 8, 64
MULTIPLYING = ("conv", "linear", "addmm", "matmul", "bmm")  # fvcore's names of what is a product of matrices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A detector and what it is shown.

    Attributes:
        canvases: uint8 (N, 3, H, W), what is timed and compared.
        calibration: uint8 (M, 3, H, W), what the int8 file is calibrated on.
        engine: a TensorRT plan of the same weights, where there is one.
    """

    name: str
    detector: nn.Module
    signature: DetectorSignature
    canvases: np.ndarray
    calibration: np.ndarray
    engine: Path | None


def student_of(run_dir: Path, recipe_name: str) -> Subject:
    """A run's student on its validation images, and its engine where it has one."""
    recipe, data = recipes.load(recipe_name), open_artifact(run_dir / "data")
    dataset = dataset_of(data, "validation")
    checkpoint = open_artifact(run_dir / "strip").path(STUDENT_CHECKPOINT)
    student = load_student(build_student(recipe.model, len(dataset.class_names)), checkpoint)
    signature = DetectorSignature.read(run_dir / "export")
    engine = run_dir / "engine" / "model.plan"
    return Subject(
        name=f"{recipe_name}'s student",
        detector=student.eval(),
        signature=signature,
        canvases=_canvases(dataset, signature, NUM_CANVASES),
        calibration=_canvases(dataset_of(data, "train"), signature, NUM_CALIBRATION),
        engine=engine if engine.is_file() else None,
    )


def zoo_subject(config: str, size: int) -> Subject:
    """A configuration of the model zoo on square crops of photos."""
    detector = stock_detector(config).eval()
    calibrate(detector, conftest.canvases(size, size, 4, seed=1))
    names = [str(number) for number in range(80)]
    signature = signature_of(
        detector,
        canvas=(size, size),
        short_edge=size,
        max_edge=size,
        class_names=names,
        category_ids=range(len(names)),
        max_batch_size=ZOO_BATCH,
    )
    photos = np.stack(conftest.canvases(size, size, NUM_CANVASES))
    calibration = np.stack(conftest.canvases(size, size, NUM_CALIBRATION, seed=2))
    return Subject(
        name=config, detector=detector, signature=signature, canvases=photos, calibration=calibration, engine=None
    )


def multiply_adds(subject: Subject) -> int:
    """Of the convolutions and matrix products that detectron2's detector does on one image."""
    counted = FlopCountAnalysis(subject.detector, [{"image": torch.from_numpy(subject.canvases[0])}])
    counted.unsupported_ops_warnings(False).tracer_warnings("none")
    with torch.no_grad():
        return int(sum(counted.by_operator()[name] for name in MULTIPLYING))


def _canvases(dataset: CocoDataset, signature: DetectorSignature, number: int) -> np.ndarray:
    """Images spread over a data set, (N, 3, H, W) uint8."""
    records = detectron2_dicts(dataset)
    chosen = [records[index] for index in np.linspace(0, len(records) - 1, number).round().astype(int)]
    return np.stack([canvas_from_image(read_image(Path(record["file_name"])), signature)[0] for record in chosen])
