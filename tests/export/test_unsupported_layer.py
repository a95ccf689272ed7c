"""A layer that cannot be exported is named, with the operator or the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.detector_graph import UnsupportedDetector, detector_graph
from export.targets.onnx_target import export_onnx
from export.unsupported_layer import unsupported_layer_named
from tests.export.conftest import calibrated_retinanet, signature_for


class SingularValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linalg.svdvals(x)[..., :1, None]


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else 2 * x


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (SingularValues(), r"ONNX has no operator for aten\._linalg_svd"),
        (Branch(), r"Could not guard on data-dependent expression"),
    ],
)
def test_the_layer_and_the_reason_are_in_the_message(layer: nn.Module, reason: str, tmp_path: Path) -> None:
    detector = calibrated_retinanet()
    detector.backbone.bottom_up.res4.add_module("strange", layer)
    signature = signature_for(detector, 64, 96)
    graph = detector_graph(detector, signature)
    named = rf"layer backbone\.bottom_up\.res4\.strange \({type(layer).__name__}\) cannot be exported: {reason}"
    with (
        pytest.raises(UnsupportedDetector, match=rf"{named}.*supported families: .*FCOS, "),
        unsupported_layer_named(graph, signature),
    ):
        export_onnx(graph, signature, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
