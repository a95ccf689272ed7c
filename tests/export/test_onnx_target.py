from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from export.graph_parts import DetectorGraph, Outputs
from export.signature import DetectorSignature
from export.targets.onnx_target import SIGNATURE_KEY, export_onnx
from tests.export.conftest import Exported, canvases


def test_the_file_takes_every_batch_size_and_fixes_every_other_dimension(exported: Exported) -> None:
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    signature = exported.signature
    (images,) = session.get_inputs()
    assert (images.name, images.type) == ("images", "tensor(uint8)")
    assert isinstance(images.shape[0], str)
    assert tuple(images.shape[1:]) == signature.image_shape
    assert tuple(output.name for output in session.get_outputs()) == exported.signature.output_names
    batch = np.stack(canvases(signature.canvas_height, signature.canvas_width, signature.max_batch_size))
    for size in range(1, signature.max_batch_size + 1):
        outputs = session.run(None, {"images": batch[:size]})
        assert [output.shape for output in outputs] == [(size, 1), (size, 100, 4), (size, 100), (size, 100)]


def test_empty_slots_are_zero_and_scores_descend(exported: Exported) -> None:
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    signature = exported.signature
    images = np.stack(canvases(signature.canvas_height, signature.canvas_width, 8))
    counts, boxes, scores, labels = session.run(None, {"images": images})
    used = np.arange(signature.max_detections) < counts
    assert (scores[used] > signature.score_threshold).all()
    assert not boxes[~used].any()
    assert not scores[~used].any()
    assert not labels[~used].any()
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (boxes[..., 2:] >= boxes[..., :2]).all()
    assert boxes.min() >= 0
    assert boxes[..., 0::2].max() <= signature.canvas_width
    assert boxes[..., 1::2].max() <= signature.canvas_height


def test_the_file_is_whole_in_itself_carries_the_signature_and_no_path_of_this_machine(exported: Exported) -> None:
    model = onnx.load(exported.path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert DetectorSignature.from_json(metadata[SIGNATURE_KEY]) == exported.signature
    assert all(not tensor.external_data for tensor in model.graph.initializer)
    assert [p.name for p in exported.path.parent.iterdir() if p.suffix != ".plan"] == ["model.onnx"]
    assert str(Path(__file__).parents[2]).encode() not in exported.path.read_bytes()


def test_the_facts_describe_the_file_and_the_operators_are_portable(exported: Exported) -> None:
    facts = exported.facts
    assert facts.opset == 20
    assert facts.size_bytes == exported.path.stat().st_size
    assert sum(facts.ops.values()) == facts.num_nodes < 700
    assert not set(facts.ops) & {"NonMaxSuppression", "NonZero", "BatchNormalization", "If"}


def test_exporting_prints_nothing_and_the_same_weights_give_the_same_bytes(
    exported: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export_onnx(exported.graph, exported.signature, tmp_path / "again.onnx")
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "again.onnx").read_bytes() == exported.path.read_bytes()


class _TooFewSlots(DetectorGraph):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(1))

    def with_head_tensors(self, images: Tensor) -> tuple[Outputs, dict[str, Tensor]]:
        scores = images.float().flatten(1)[:, :50] * self.zero
        boxes = scores[:, :, None].expand(-1, -1, 4) + 1
        return (scores[:, :1].int(), boxes, scores * 1, scores.int()), {}


def test_a_graph_that_breaks_the_signatures_promise_is_not_written(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"'scores', 1, \(50,\).*the signature promises.*'scores', 1, \(100,\)"):
        export_onnx(_TooFewSlots(), exported.signature, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
