"""The rung of ONNX Runtime's TensorRT provider is measured where it can be, and otherwise says why not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from export import providers
from export.parity import ParityConfig
from export.providers import CPU, CUDA, TENSORRT
from pipeline import provider_rungs
from pipeline.accuracy import Ladder
from pipeline.artifact import digest
from pipeline.provider_rungs import IN_TENSORRT, add_provider_rungs
from pipeline.stage import StageContext
from tests.serving.pixel_means import (
    assert_same_detections,
    expected_detections,
    make_signature,
    random_images,
    write_pixel_means_model,
)


class Recorded:
    """A ladder that keeps what it is given."""

    def __init__(self) -> None:
        self.not_run: list[tuple[str, ...]] = []
        self.added: list[tuple[Any, ...]] = []

    def canvases(self) -> Iterable[np.ndarray]:
        return iter(random_images(11))

    def add_not_run(self, *row: str) -> None:
        self.not_run.append(row)

    def add(self, rung: Any, found: Iterable[Any], model: Path, note: str) -> None:
        self.added.append((rung, list(found), model, note))


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    path = write_pixel_means_model(tmp_path / "model.onnx", make_signature())
    inputs = {"export": SimpleNamespace(path=lambda name: path)}
    recipe = SimpleNamespace(sections={"parity": ParityConfig(max_ap_drop_tensorrt=0.2)})
    return cast(StageContext, SimpleNamespace(inputs=inputs, recipe=recipe))


def test_a_provider_that_is_not_there_is_one_line_with_its_reason(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "_reason", lambda name: "" if name == CPU else f"no {name}")
    ladder = Recorded()
    reasons = add_provider_rungs(cast(Ladder, ladder), context, make_signature())
    assert reasons == {CPU: "", CUDA: f"no {CUDA}", TENSORRT: f"no {TENSORRT}"}
    model = context.inputs["export"].path("model.onnx")
    assert ladder.not_run == [(IN_TENSORRT, f"no {TENSORRT}", digest(model))]
    assert not ladder.added


def test_one_that_is_there_is_held_to_onnx_runtime_and_to_the_canvas(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(provider_rungs, "provider_reasons", lambda: {CPU: "", CUDA: "", TENSORRT: ""})
    monkeypatch.setattr(provider_rungs, "session_providers", lambda name: asked.append(name) or [CPU])
    ladder = Recorded()
    add_provider_rungs(cast(Ladder, ladder), context, make_signature())
    ((rung, found, _, note),) = ladder.added
    assert asked == [TENSORRT]
    assert rung.compared_with == "ONNX Runtime"
    assert {name: floor.points for name, floor in rung.floors.items()} == {
        "ONNX Runtime": 0.2,
        "torch, fixed canvas": 0.2,
    }
    assert "TF32" in note
    for detections, image in zip(found, random_images(11), strict=True):
        assert_same_detections(detections, expected_detections(image))
