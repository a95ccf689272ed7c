"""A run whose early stages write tiny ready-made artifacts, for the real deploy and benchmark stages to work on."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image
from rich.console import Console

from export.parity import ParityConfig
from pipeline.artifact import plain
from pipeline.recipe import Recipe
from pipeline.run import RunSummary, run_stages
from pipeline.serving_stages import benchmark, deploy
from pipeline.stage import Stage, StageContext, StageResult
from serving.config import BenchmarkConfig, ServingConfig
from tests.serving.pixel_means import make_signature, write_pixel_means_model
from tests.stand_in_engine import write_record

NUM_IMAGES = 3
OBJECT = [5, 5, 9, 9]
PERFECT = [{"image_id": 1, "category_id": 1, "bbox": OBJECT, "score": 0.9}]


class SmallRun:
    """Data, export, precision, engine and validate in no time, then the real stages under ``folder/small[run]``.

    Attributes:
        facts: the precision; of the export and engine stages, of the rows of validate, and what ONNX Runtime found in
            process, with the exported file and with the one of int8 for CPUs.
        engine_record: what the engine's record says otherwise than one for the stand-in GPU.
        output: what was printed.
    """

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "small[run]"  # brackets are markup to rich
        self.output = io.StringIO()
        self.console = Console(file=self.output, soft_wrap=True, highlight=False)
        self.facts: dict[str, Any] = {
            "export": {"nms": "portable"},
            "precision": "fp32",
            "engine": {"status": "built", "reason": "", "library": "tensorrt_rtx", "version": "1.6"},
            "in_process": [],  # as good as what the model of pixel means finds
            "in process, int8 on a CPU": [],
            "onnxruntime": {"AP": 11.0},
            "tensorrt": {"AP": 22.0},
            "int8 on a CPU": {"AP": 33.0},
        }
        self.engine_record: dict[str, Any] = {}
        self.serving: dict[str, Any] = {"model_name": "m"}
        self.benchmark: dict[str, Any] = {"seconds_per_point": 0.3, "num_images": 2, "warmup_requests": 1}

    @property
    def repository(self) -> Path:
        return self.run_dir / "model_repository"

    def run(self, until: str = "deploy", **options: Any) -> RunSummary:
        """Walk the stages as the command line does."""
        sections = {
            "parity": ParityConfig(),
            "serving": ServingConfig(**self.serving),
            "benchmark": BenchmarkConfig(**self.benchmark),
        }
        recipe = Recipe(
            name="small",
            path=Path("small.py"),
            sections=sections,
            resolved={name: plain(dataclasses.asdict(section)) for name, section in sections.items()},
        )
        return run_stages(self._stages(), recipe, self.run_dir, console=self.console, until=until, **options)

    def _stages(self) -> tuple[Stage, ...]:
        def early(name: str, run: Any) -> Stage:
            salt = json.dumps(self.facts)
            return Stage(
                name=name, version=1, inputs=(), config_sections=(), run=run, external_inputs=lambda _: {"salt": salt}
            )

        return (
            early("data", small_data),
            early("export", self._export),
            early("precision", self._precision),
            early("engine", self._engine),
            early("validate", self._validate),
            Stage(
                name="deploy",
                version=1,
                inputs=("data", "export", "precision", "engine", "validate"),
                config_sections=("parity", "serving"),
                run=deploy,
            ),
            Stage(
                name="benchmark",
                version=1,
                inputs=("data", "export", "precision", "engine", "deploy"),
                config_sections=("serving", "benchmark"),
                run=benchmark,
            ),
        )

    def _export(self, context: StageContext) -> StageResult:
        signature = make_signature()
        write_pixel_means_model(context.directory / "model.onnx", signature)
        signature.write(context.directory)
        return StageResult(facts=self.facts["export"])

    def _precision(self, context: StageContext) -> StageResult:
        for name in ("model.onnx", "model_cpu.onnx"):  # told apart by where their bytes lie
            model = onnx.load(write_pixel_means_model(context.directory / name, make_signature()))
            model.doc_string = name
            onnx.save(model, context.directory / name)
        return StageResult(facts={"precision": self.facts["precision"]})

    def _engine(self, context: StageContext) -> StageResult:
        (context.directory / "model.plan").write_bytes(b"engine")
        write_record(context.directory / "model.plan", **self.engine_record)
        make_signature().write(context.directory)
        return StageResult(facts=self.facts["engine"])

    def _validate(self, context: StageContext) -> StageResult:
        rows = [
            {"name": "detectron2", "AP": 0.0},
            {"name": "ONNX Runtime", **self.facts["onnxruntime"]},
            {"name": "ONNX Runtime, int8 (CPU)", **self.facts["int8 on a CPU"]},
            {"name": "TensorRT", **self.facts["tensorrt"]},
        ]
        for name, found in (("", "in_process"), ("_int8_cpu", "in process, int8 on a CPU")):
            (context.directory / f"detections_onnx_runtime{name}.json").write_text(json.dumps(self.facts[found]))
        return StageResult(facts={"rows": rows})


def small_data(context: StageContext) -> StageResult:
    """A validation set of three flat images with one object."""
    signature = make_signature()
    (context.directory / "images").mkdir()
    for number in range(1, NUM_IMAGES + 1):
        pixels = np.full((48, 64, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(context.directory / "images" / f"{number}.png")
    annotations = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": 48, "width": 64}
            for number in range(1, NUM_IMAGES + 1)
        ],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": OBJECT, "area": 81, "iscrowd": 0}],
        "categories": [
            {"id": category_id, "name": name}
            for category_id, name in zip(signature.category_ids, signature.class_names, strict=True)
        ],
    }
    (context.directory / "validation.json").write_text(json.dumps(annotations))
    return StageResult(facts={"validation": {"annotation_file": "validation.json", "image_dir": "images"}})
