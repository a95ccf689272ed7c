"""The forms in which one detector can run: detectron2's own, torch.compile's, and this project's, all behind one call.

Every form takes uint8 canvases in numpy and gives :class:`Detections`: moving and unpacking count in every time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from detectron2.export import TracingAdapter
from subjects import Subject
from torch import nn

from export.config import NmsChoice
from export.cpu_quantization import write_cpu_int8
from export.detector_graph import detector_graph
from export.engine_session import EngineUnavailable
from export.graph_parts import DetectorGraph
from export.providers import usable_providers
from export.runners import OnnxRuntimeRunner, TensorRTRunner, TorchRunner
from export.signature import Detections
from export.targets.onnx_target import OPSET, export_onnx, quiet

Run = Callable[[np.ndarray], list[Detections]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how everything runs: ``num_threads`` on the CPU, for torch and ONNX Runtime alike."""

    device: torch.device
    num_threads: int
    allow_spinning: bool
    scratch: Path

    @property
    def providers(self) -> list[Any]:
        """ONNX Runtime's, for this device."""
        return usable_providers() if self.device.type == "cuda" else ["CPUExecutionProvider"]

    def session(self, model: Path | bytes) -> onnxruntime.InferenceSession:
        """A session with the options that :class:`OnnxRuntimeRunner` gives ours."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.num_threads
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.allow_spinning)))
        return onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=self.providers
        )


def detectron2_eager(subject: Subject, setting: Setting, batch: np.ndarray) -> Run:
    """The detector as detectron2 runs it."""
    return functools.partial(_of_detectron2, subject.detector, setting.device)


def detectron2_torchscript(subject: Subject, setting: Setting, batch: np.ndarray) -> Run:
    """Traced through detectron2's adapter, as its ``tools/deploy/export_model.py`` does."""
    return _of_adapter(*_traced(subject, setting, batch), setting.device)


def detectron2_optimized_torchscript(subject: Subject, setting: Setting, batch: np.ndarray) -> Run:
    """The same, frozen and through ``torch.jit.optimize_for_inference``."""
    adapter, traced = _traced(subject, setting, batch)
    return _of_adapter(adapter, torch.jit.optimize_for_inference(traced.eval()), setting.device)


def detectron2_onnx(subject: Subject, setting: Setting, batch: np.ndarray) -> Run:
    """detectron2's adapter through torch's tracing exporter, in ONNX Runtime; the file takes this batch size alone."""
    adapter = _adapter(subject, setting, batch)
    path = setting.scratch / f"detectron2_{len(batch)}.onnx"
    with quiet(), torch.no_grad():
        torch.onnx.export(adapter, adapter.flattened_inputs, path, opset_version=OPSET, dynamo=False)
    session = setting.session(path)
    names = [given.name for given in session.get_inputs()]

    def run(images: np.ndarray) -> list[Detections]:
        outputs = session.run(None, dict(zip(names, images, strict=True)))
        return _detections(adapter.outputs_schema([torch.from_numpy(output) for output in outputs]))

    return run


def graph_eager(subject: Subject, setting: Setting, batch: np.ndarray) -> Run:
    """The export graph in eager torch."""
    return TorchRunner(_graph(subject), subject.signature).run


def graph_compiled(subject: Subject, setting: Setting, batch: np.ndarray) -> Run:
    """The export graph through torch.compile with its default settings, for this batch size alone.

    It breaks the graph where the loop of NMS asks whether it has ended.
    """
    graph = _graph(subject)
    runner = TorchRunner(graph, subject.signature)
    graph.compile(dynamic=False)
    return runner.run


def ours(subject: Subject, setting: Setting, batch: np.ndarray) -> Run:
    """The float32 file of the export stage in ONNX Runtime."""
    return _our_runner(_our_file(subject, setting), subject, setting)


def ours_onnx_nms(subject: Subject, setting: Setting, batch: np.ndarray) -> Run:
    """The same with ``export.nms=onnx``: ONNX Runtime's own NonMaxSuppression."""
    path = setting.scratch / "ours_onnx_nms.onnx"
    if not path.is_file():
        export_onnx(_graph(subject, "onnx"), subject.signature, path)
    return _our_runner(path, subject, setting)


def ours_int8(subject: Subject, setting: Setting, batch: np.ndarray) -> Run:
    """The int8 file that the precision stage writes for CPUs, in ONNX Runtime."""
    path = setting.scratch / "ours_int8.onnx"
    if not path.is_file():
        write_cpu_int8(_our_file(subject, setting), path, subject.calibration)
    return _our_runner(path, subject, setting)


def ours_engine(subject: Subject, setting: Setting, batch: np.ndarray) -> Run:
    """The run's TensorRT engine."""
    if subject.engine is None:
        raise EngineUnavailable("there is no engine of these weights; give a run that came as far as engine")
    return TensorRTRunner(subject.engine, subject.signature).run


REFERENCE = "detectron2, eager"
OURS = {
    "cpu": ("ours, ONNX Runtime", "ours, ONNX Runtime, nms=onnx", "ours, ONNX Runtime, int8"),
    "cuda": ("ours, ONNX Runtime", "ours, TensorRT"),
}
_RIVALS: dict[str, Callable[[Subject, Setting, np.ndarray], Run]] = {
    REFERENCE: detectron2_eager,
    "detectron2, TorchScript": detectron2_torchscript,
    "detectron2, TorchScript optimized": detectron2_optimized_torchscript,
    "detectron2, ONNX Runtime": detectron2_onnx,
    "export graph, eager": graph_eager,
    "export graph, torch.compile": graph_compiled,
}
CONTENDERS = {
    "cpu": {**_RIVALS, **dict(zip(OURS["cpu"], (ours, ours_onnx_nms, ours_int8), strict=True))},
    "cuda": {**_RIVALS, **dict(zip(OURS["cuda"], (ours, ours_engine), strict=True))},
}
"""What is timed on each device, by name."""


def _of_detectron2(detector: Callable[..., Any], device: torch.device, images: np.ndarray) -> list[Detections]:
    with torch.inference_mode():
        return _detections(detector(_inputs(images, device)))


def _of_adapter(adapter: TracingAdapter, traced: Callable[..., Any], device: torch.device) -> Run:
    def run(images: np.ndarray) -> list[Detections]:
        with torch.inference_mode():
            outputs = traced(*(each["image"] for each in _inputs(images, device)))
            return _detections(adapter.outputs_schema(outputs))

    return run


def _traced(subject: Subject, setting: Setting, batch: np.ndarray) -> tuple[TracingAdapter, torch.jit.ScriptModule]:
    adapter = _adapter(subject, setting, batch)
    with quiet(), torch.no_grad():
        return adapter, torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)


def _adapter(subject: Subject, setting: Setting, batch: np.ndarray) -> TracingAdapter:
    inference = _without_postprocessing if hasattr(subject.detector, "roi_heads") else None
    # Not in training mode, which torch's exporter would put it, and with it the detector, back into.
    return TracingAdapter(subject.detector, _inputs(batch, setting.device), inference).eval()


def _without_postprocessing(detector: nn.Module, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As ``export_model.py`` traces a GeneralizedRCNN."""
    return [{"instances": found} for found in detector.inference(inputs, do_postprocess=False)]


def _inputs(images: np.ndarray, device: torch.device) -> list[dict[str, Any]]:
    return [{"image": image} for image in torch.from_numpy(images).to(device)]


def _detections(results: list[dict[str, Any]]) -> list[Detections]:
    """What detectron2 found, without the empty boxes that its postprocessing drops."""
    found = []
    for instances in (result["instances"] for result in results):
        boxes = instances.pred_boxes.tensor
        detections = Detections(
            boxes=boxes.cpu().numpy(),
            scores=instances.scores.cpu().numpy(),
            labels=instances.pred_classes.cpu().numpy().astype(np.int32),
        )
        found.append(detections.where((detections.boxes[:, 2:] > detections.boxes[:, :2]).all(axis=1)))
    return found


def _graph(subject: Subject, nms: NmsChoice = "portable") -> DetectorGraph:
    return detector_graph(subject.detector, subject.signature, nms)


def _our_file(subject: Subject, setting: Setting) -> Path:
    path = setting.scratch / "ours.onnx"
    if not path.is_file():
        export_onnx(_graph(subject), subject.signature, path)
    return path


def _our_runner(path: Path, subject: Subject, setting: Setting) -> Run:
    return OnnxRuntimeRunner(
        path,
        subject.signature,
        num_threads=setting.num_threads,
        allow_spinning=setting.allow_spinning,
        providers=setting.providers,
    ).run
