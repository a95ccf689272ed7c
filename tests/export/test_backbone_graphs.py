"""A backbone that takes one size alone exports for batches of any size; the others: tests/conformance."""

from __future__ import annotations

import io

import onnxruntime
import torch
from torch import Tensor, nn

from export.targets.onnx_target import OPSET
from training.backbones.timm_backbone import TimmBackbone


class Maps(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.backbone(images)
        return tuple(maps.values()) if isinstance(maps, dict) else (maps,)


def test_a_transformer_of_one_size_exports_with_a_free_batch_dimension() -> None:
    torch.manual_seed(0)
    graph = Maps(TimmBackbone(name="test_vit", out_features=("res4",), img_size=(64, 64))).eval()
    with torch.no_grad():
        program = torch.onnx.export(
            graph,
            (torch.randn(2, 3, 40, 64),),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},),
            verbose=False,
        )
    stream = io.BytesIO()
    program.save(stream)
    session = onnxruntime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 3, 40, 64)
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.inference_mode():
            expected = graph(images)
        assert len(found) == len(expected)
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(value), wanted, rtol=1e-4, atol=1e-4)
