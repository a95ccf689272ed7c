"""Backbones of other code than detectron2's export for batches of any size and compute the same in ONNX Runtime."""

from __future__ import annotations

import io
from collections.abc import Callable

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from export.targets.onnx_target import OPSET
from training.backbones.deformable import DeformableBottleneckBlock
from training.backbones.swin import Swin
from training.backbones.timm_backbone import TimmBackbone


def swin() -> nn.Module:
    network = Swin(embed_dim=12, depths=(2, 1), num_heads=(1, 2), out_indices=(0, 1))
    for name, parameter in network.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)
    return network


def deformable() -> nn.Module:
    block = DeformableBottleneckBlock(3, 8, bottleneck_channels=4, stride=2, num_groups=2, norm="FrozenBN")
    nn.init.normal_(block.conv2_offset.weight)
    nn.init.normal_(block.conv2_offset.bias)
    return block


def timm_of_convolutions() -> nn.Module:
    return TimmBackbone(name="test_efficientnet")


def timm_of_one_size() -> nn.Module:
    return TimmBackbone(name="test_vit", out_features=("res4",), img_size=(64, 64))


class Maps(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.backbone(images)
        return tuple(maps.values()) if isinstance(maps, dict) else (maps,)


@pytest.mark.parametrize("build", [swin, deformable, timm_of_convolutions, timm_of_one_size])
def test_a_backbone_exports_with_a_free_batch_dimension(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    graph = Maps(build()).eval()
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
    if build is timm_of_convolutions:  # those behind plain convolutions are folded into them
        assert "BatchNormalization" not in {node.op_type for node in program.model_proto.graph.node}
    session = onnxruntime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 3, 40, 64)
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.inference_mode():
            expected = graph(images)
        assert len(found) == len(expected)
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(value), wanted, rtol=1e-4, atol=1e-4)
