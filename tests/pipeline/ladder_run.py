"""A run of a tiny calibrated RetinaNet through the real validate stage, with a fault in its graph or in a file."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from conftest import tiny_bottom_up
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from onnx import ModelProto
from PIL import Image
from rich.console import Console

from export.detector_graph import detector_graph, signature_of
from export.parity import ParityConfig
from export.signature import Detections, DetectorSignature
from export.targets import onnx_target
from pipeline import recipe as recipes
from pipeline.accuracy import detectron2_on_canvas
from pipeline.errors import GateFailed
from pipeline.export_stages import validate
from pipeline.precision_stage import precision
from pipeline.recipe import Recipe
from pipeline.recipe_parts import retinanet
from pipeline.run import run_stages
from pipeline.stage import Stage, StageContext, StageResult
from pipeline.training_stages import STUDENT_CHECKPOINT
from tests.calibration import calibrate
from tests.export.conftest import canvases
from training.student import build_student

TINY = Path(__file__).with_name("tiny_recipe.py")
CLASS_NAMES, CATEGORY_IDS = ("crab", "whale", "gull"), (3, 5, 8)
HEIGHT, WIDTH, NUM_IMAGES = 128, 192, 5
NMS_THRESHOLD = 0.6  # a number that the graph has for nothing else
CERTAIN = 0.2
Fault = Callable[[Any], object]


@dataclasses.dataclass(frozen=True)
class Sound:
    """What every run starts from: the detector, its signature, its exported file as torch notes it, and that file."""

    recipe: Recipe
    detector: RetinaNet
    signature: DetectorSignature
    traced: ModelProto
    exported: ModelProto
    images: Sequence[np.ndarray]


def sound(folder: Path) -> Sound:
    """Export once; all runs share it."""
    model = retinanet(tiny_bottom_up("res3", "res4", "res5"), channels=16, num_head_convs=1, smallest_anchor_pixels=16)
    model.test_topk_candidates, model.test_nms_thresh = 200, NMS_THRESHOLD
    edges = [
        f"export.canvas=[{HEIGHT},{WIDTH}]",
        f"export.short_edge_pixels={HEIGHT}",
        f"export.max_edge_pixels={WIDTH}",
    ]
    recipe = dataclasses.replace(recipes.load(TINY, edges), model=model)
    parity = ParityConfig(num_matching_images=NUM_IMAGES, num_batch_images=3, min_matched_score=0.1)
    recipe = dataclasses.replace(recipe, sections={**recipe.sections, "parity": parity})
    detector = build_student(model, len(CLASS_NAMES), seed=0).eval()
    images = canvases(HEIGHT, WIDTH, NUM_IMAGES)
    calibrate(detector, images)
    signature = signature_of(
        detector,
        canvas=(HEIGHT, WIDTH),
        short_edge=HEIGHT,
        max_edge=WIDTH,
        class_names=CLASS_NAMES,
        category_ids=CATEGORY_IDS,
        max_batch_size=4,
    )
    graph = detector_graph(detector, signature)
    traced = onnx_target.traced_onnx(graph, signature)
    with mock.patch.object(onnx_target, "traced_onnx", return_value=copy.deepcopy(traced)):
        onnx_target.export_onnx(graph, signature, folder / "model.onnx")
    return Sound(recipe, detector, signature, traced, onnx.load(folder / "model.onnx"), images)


def run_of(
    start: Sound,
    run_dir: Path,
    *,
    file_fault: Fault | None = None,
    truth: Sequence[Detections] | None = None,
    **stages: Any,
) -> str | None:
    """Walk the stages up to validate, with a fault put into the exported file; the failed stage, if one failed.

    Args:
        truth: what is on each image; by default what detectron2 is certain of.
        stages: what other stages do than usual, by name.
    """
    truth = truth or [detectron2_on_canvas(start.detector, image).above(CERTAIN) for image in start.images]
    functions = {
        "data": functools.partial(_data, start, truth),
        "strip": functools.partial(_strip, start),
        "export": functools.partial(_export, start, file_fault),
        "precision": precision,
        "engine": lambda _: StageResult(facts={"status": "not run", "reason": "not asked for"}),
        "validate": validate,
    } | stages
    walk = [
        Stage(name=name, version=1, inputs=inputs, config_sections=(), run=functions[name])
        for name, inputs in _with_those_before(functions)
    ]
    try:
        run_stages(walk, start.recipe, run_dir, console=Console(file=io.StringIO()))
    except GateFailed as failure:
        return failure.stage
    return None


def _with_those_before(names: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for position, name in enumerate(names):
        yield name, tuple(names)[:position]


def _data(start: Sound, truth: Sequence[Detections], context: StageContext) -> StageResult:
    (context.directory / "images").mkdir()
    annotations: list[dict[str, Any]] = []
    for number, (image, found) in enumerate(zip(start.images, truth, strict=True), 1):
        Image.fromarray(image.transpose(1, 2, 0)).save(context.directory / "images" / f"{number}.png")
        for (x1, y1, x2, y2), label in zip(found.boxes.tolist(), found.labels.tolist(), strict=True):
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            identity = {"id": len(annotations) + 1, "image_id": number, "category_id": CATEGORY_IDS[label]}
            annotations.append(identity | box)
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(1, NUM_IMAGES + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)],
    }
    (context.directory / "validation.json").write_text(json.dumps(content))
    facts = {"validation": {"annotation_file": "validation.json", "image_dir": "images"}}
    return StageResult(facts={**facts, "class_names": CLASS_NAMES, "category_ids": CATEGORY_IDS})


def _strip(start: Sound, context: StageContext) -> StageResult:
    torch.save({"model": start.detector.state_dict()}, context.directory / STUDENT_CHECKPOINT)
    return StageResult()


def _export(start: Sound, fault: Fault | None, context: StageContext) -> StageResult:
    model = copy.deepcopy(start.exported)
    if fault is not None:
        fault(model)
    onnx.save(model, context.directory / "model.onnx")
    start.signature.write(context.directory)
    return StageResult(facts={"nms": "portable"})
