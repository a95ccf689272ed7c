"""``validate --bisect``: the first place of a run's graph and files that departs from detectron2.

What is compared is what the ladder compares, in its order: the export graph with detectron2, the exported file with a
fresh export of the same student, what that gives with the graph, and each converted file with the exported one. The
search ends at the first that departs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from torch import nn

from export.departure import Departure
from export.detector_graph import detector_graph
from export.exporter_departure import exporter_departure
from export.onnx_departure import onnx_departure, tail_departure, trunk_departure
from export.signature import DetectorSignature
from export.targets.onnx_target import traced_onnx
from export.torch_departure import batch_departure, torch_departure
from pipeline.accuracy import detectron2_on_canvas
from pipeline.artifact import Artifact, digest, open_artifact, plain
from pipeline.errors import GateFailed
from pipeline.export_stages import GRAPH, loaded_student, probe_canvases
from pipeline.lock import locked
from pipeline.model_files import ONNX_MODEL, ONNX_RUNTIME, ModelFile, converted_files, precision_of
from pipeline.precision_rungs import runs_here
from pipeline.recipe import Recipe
from pipeline.stage import StageContext
from pipeline.training_stages import STUDENT_CHECKPOINT, dataset_of
from serving.preprocessing import canvas_from_image, read_image
from training.dataset import detectron2_dicts

BISECTION_FILE = "bisect.json"
NUM_IMAGES = 3
LOOKED_INTO = ("export", "precision", "validate")
Found = tuple[str, Departure] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bisection:
    """What was compared and what departs.

    Attributes:
        first_lossy_rung: the verdict of the ladder; None where it has none.
        rung: the rung that the departure belongs to; None: nothing departs.
        departure: the first place that departs.
        compared: what was compared, in its order.
        num_images: how many were looked at.
        files: SHA-256 of the files that were compared, by path in the run folder.
    """

    first_lossy_rung: str | None
    rung: str | None
    departure: Departure | None
    compared: tuple[str, ...]
    num_images: int
    files: dict[str, str]

    def paragraph(self) -> str:
        """The result for a reader."""
        if self.departure is not None:
            return f"bisect: the first that departs, at the rung {self.rung!r}:\n  {self.departure.paragraph()}"
        told = f"bisect: no node departs on {self.num_images} images; compared: {', '.join(self.compared)}"
        if self.first_lossy_rung is not None:
            told += (
                f". The ladder's first lossy rung is {self.first_lossy_rung!r}: its loss is not in the ONNX graph as "
                "ONNX Runtime runs it node by node, or not on these images; engines and servers are not looked into"
            )
        return told


@contextlib.contextmanager
def bisecting(recipe: Recipe, run_dir: Path, console: Console) -> Iterator[None]:
    """:func:`bisect` when what runs inside has ended, also with a failed gate of a stage that is looked into."""
    try:
        yield
    except GateFailed as failure:
        if failure.stage in LOOKED_INTO:
            bisect(recipe, run_dir, console)
        raise
    bisect(recipe, run_dir, console)


def bisect(recipe: Recipe, run_dir: Path, console: Console) -> Bisection:
    """Find the first place that departs, print it and write it to :data:`BISECTION_FILE` in the run folder.

    It lies beside the artifacts and is none: an artifact is not changed after it was published. What was made from an
    earlier export does not count.

    Raises:
        ArtifactError: the export artifact or one before it is missing or damaged.
        RunLocked: another process works in the folder.
    """
    with locked(run_dir, recipe.command):
        inputs = {name: open_artifact(run_dir / name) for name in ("data", "strip", "export")}
        later = {name: open_artifact(run_dir / name) for name in ("precision", "validate") if (run_dir / name).is_dir()}
        made_from = inputs["export"].manifest.content_digest
        inputs |= {name: each for name, each in later.items() if each.manifest.inputs.get("export") == made_from}
        context = StageContext(
            directory=run_dir, run_dir=run_dir, recipe=recipe, inputs=inputs, console=console, command=recipe.command
        )
        result = bisected(context)
        (run_dir / BISECTION_FILE).write_text(json.dumps(plain(result), indent=1) + "\n")
    console.print(result.paragraph())
    console.print(f"written to {run_dir / BISECTION_FILE}")
    return result


def bisected(context: StageContext) -> Bisection:
    """Compare form with form until one departs."""
    inputs = context.inputs
    signature = DetectorSignature.read(inputs["export"].directory)
    student = loaded_student(context)
    canvases = _canvases(context, signature)
    compared: list[str] = []
    found: Found = None
    for what, departures in _steps(context, student, signature, canvases):
        compared.append(what)
        found = next((each for each in departures if each is not None), None)
        if found is not None:
            break
    paths = {
        f"strip/{STUDENT_CHECKPOINT}": inputs["strip"].path(STUDENT_CHECKPOINT),
        f"export/{ONNX_MODEL}": inputs["export"].path(ONNX_MODEL),
        **{f"precision/{file.name}": file.path for file in _converted(inputs)},
    }
    return Bisection(
        first_lossy_rung=next((row["name"] for row in _rows(inputs) if row["status"] == "failed"), None),
        rung=found and found[0],
        departure=found and found[1],
        compared=tuple(compared),
        num_images=len(canvases),
        files={name: digest(path) for name, path in paths.items()},
    )


def _steps(
    context: StageContext, student: nn.Module, signature: DetectorSignature, canvases: Sequence[np.ndarray]
) -> Iterator[tuple[str, Iterator[Found]]]:
    """What is compared with what, and lazily what departs, with the rung that it belongs to."""
    path, nms = context.inputs["export"].path(ONNX_MODEL), context.recipe.sections["export"].nms
    graph = detector_graph(student, signature)
    in_torch = (torch_departure(student, graph, signature, canvas, detectron2_on_canvas) for canvas in canvases)
    yield "the export graph with detectron2", _at(GRAPH, in_torch)
    if signature.max_batch_size > 1:
        batch = (batch_departure(graph, signature, each) for each in [_first_two(canvases)])
        yield "the export graph in a batch with itself one by one", _at(GRAPH, batch)
    exported, feeds = onnx.load(path), list(_feeds(signature, canvases))
    fresh = traced_onnx(detector_graph(student, signature, nms), signature, ends_at_candidates=nms == "outside")
    yield (
        "the exported file with a fresh export of the student",
        _at(ONNX_RUNTIME, (onnx_departure(exported, fresh, each) for each in feeds)),
    )
    in_runtime = (exporter_departure(path, graph, signature, canvas) for canvas in canvases)
    yield "the exported file in ONNX Runtime with the graph in torch", _at(ONNX_RUNTIME, in_runtime)
    for file in _converted(context.inputs):
        converted = onnx.load(file.path)
        tails = (tail_departure(converted, exported, each) for each in feeds)
        yield f"decoding and NMS of {file.path.name} in the precision asked for with the exported", _at(file.row, tails)
        if any(row["name"] == file.row and row["status"] == "failed" for row in _rows(context.inputs)):
            trunks = (trunk_departure(converted, exported, each) for each in feeds[:1])
            yield f"the trunk of {file.path.name} in the precision asked for with the exported", _at(file.row, trunks)


def _at(rung: str, departures: Iterator[Departure | None]) -> Iterator[Found]:
    return (None if departure is None else (rung, departure) for departure in departures)


def _feeds(signature: DetectorSignature, canvases: Sequence[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Every image alone, and two together: what depends on the batch shows there."""
    for canvas in canvases:
        yield {signature.input_name: canvas[None]}
    if signature.max_batch_size > 1:
        yield {signature.input_name: np.stack(_first_two(canvases))}


def _first_two(canvases: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of a single image, itself and its mirror image."""
    return [canvases[0], canvases[1] if len(canvases) > 1 else np.ascontiguousarray(canvases[0][:, :, ::-1])]


def _converted(inputs: Mapping[str, Artifact]) -> list[ModelFile]:
    """The files of the precision stage that ONNX Runtime runs here."""
    return converted_files(inputs) if "precision" in inputs and runs_here(precision_of(inputs)) else []


def _rows(inputs: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """The rows of the ladder, where validate came so far."""
    return inputs["validate"].manifest.facts["rows"] if "validate" in inputs else []


def _canvases(context: StageContext, signature: DetectorSignature) -> list[np.ndarray]:
    """A few validation images, those first on which a rung that failed changed most; photos where there are none."""
    data = context.inputs["data"]
    if "validation" not in data.manifest.facts:
        return probe_canvases(context, signature)[:NUM_IMAGES]
    changed = [
        image["image_id"]
        for row in _rows(context.inputs)
        if row["status"] == "failed"
        for image in row.get("changed_images", [])
    ]
    rank = {image_id: position for position, image_id in reversed([*enumerate(changed)])}
    records = detectron2_dicts(dataset_of(data, "validation"))
    chosen = sorted(records, key=lambda record: rank.get(record["image_id"], len(changed)))[:NUM_IMAGES]
    return [canvas_from_image(read_image(Path(record["file_name"])), signature)[0] for record in chosen]
