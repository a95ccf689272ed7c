"""Random weights that detect: outputs as varied as a trained detector's, so that hundreds of boxes pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import Tensor, nn

from training.backbones.deformable import DeformableBottleneckBlock
from training.detectors.distribution_retinanet import DistributionRetinaNet
from training.detectors.gfl_detector import GflDetector
from training.detectors.location_detector import LocationDetector

# Random residual blocks of full strength multiply a rounding error with every block: after a ResNet-50's, float32 was
# 8e-5 of a feature's deviation from float64, and with this gain 1e-5 (192 x 256 pixels).
RESIDUAL_GAIN = 0.25
LAST_CONVOLUTIONS: dict[type, str] = {BasicBlock: "conv2", BottleneckBlock: "conv3", DeformableBottleneckBlock: "conv3"}
Spread = tuple[nn.Module, float, float]  # a last layer, and the deviation and mean that its outputs get


@torch.no_grad()
def calibrate(detector: nn.Module, images: Sequence[np.ndarray]) -> None:
    """Change the norms' statistics and the last layers of a detector of any exported family, none of its shapes.

    Args:
        detector: stock, on the CPU.
        images: uint8 (3, H, W).
    """
    inputs = [{"image": torch.from_numpy(image)} for image in images]
    for block in detector.modules():
        if type(block) in LAST_CONVOLUTIONS:
            getattr(block, LAST_CONVOLUTIONS[type(block)]).norm.weight.fill_(RESIDUAL_GAIN)
    hooks = [
        module.register_forward_pre_hook(_take_statistics)
        for module in detector.modules()
        if isinstance(module, FrozenBatchNorm2d | nn.modules.batchnorm._BatchNorm)
    ]
    detector.eval()(inputs)
    for hook in hooks:
        hook.remove()
    for layers in _last_layers(detector):  # each group sees what the one before it lets through
        outputs = _outputs_of([layer for layer, _, _ in layers], detector, inputs)
        for layer, deviation, mean in layers:
            _spread(layer, outputs[layer], deviation, mean)


def _last_layers(detector: nn.Module) -> Iterator[list[Spread]]:
    if isinstance(detector, DistributionRetinaNet | GflDetector):  # near 0 all distributions, and all boxes, are alike
        yield [(detector.head.cls_score, 1.0, -4.0), (detector.head.bbox_pred, 3.0, 0.0)]
    elif isinstance(detector, LocationDetector):
        head = detector.head
        yield [(head.cls_score, 1.0, -4.0), (head.bbox_pred, 1.0, 1.5), (head.centerness, 1.0, 0.0)]
    elif isinstance(detector, RetinaNet):
        yield [(detector.head.cls_score, 1.0, -5.0), (detector.head.bbox_pred, 0.3, 0.0)]
    elif isinstance(detector, FCOS):
        head = detector.head
        yield [(head.cls_score, 1.0, -3.5), (head.bbox_pred, 1.0, 1.5), (head.ctrness, 1.0, 0.0)]
    else:
        rpn, heads = detector.proposal_generator.rpn_head, detector.roi_heads
        yield [(rpn.objectness_logits, 2.0, 0.0), (rpn.anchor_deltas, 0.3, 0.0)]
        yield [(heads.box_predictor.cls_score, 2.0, 0.0), (heads.box_predictor.bbox_pred, 1.0, 0.0)]
        if heads.mask_on:
            yield [(heads.mask_head.predictor, 2.0, 0.0)]


def _outputs_of(layers: list[nn.Module], detector: nn.Module, inputs: list[dict]) -> dict[nn.Module, Tensor]:
    """What each layer gives over all its calls, (C, M)."""
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    # A copy, because FCOS turns its outputs into scores in place.
    hooks = [layer.register_forward_hook(lambda layer, _, out: seen[layer].append(out.clone())) for layer in layers]
    detector(inputs)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat([out.transpose(0, 1).flatten(1) for out in outs], dim=1) for layer, outs in seen.items()}


def _take_statistics(norm: nn.Module, arguments: tuple[Tensor]) -> None:
    norm.running_mean.copy_(arguments[0].mean(dim=(0, 2, 3)))
    norm.running_var.copy_(arguments[0].var(dim=(0, 2, 3)))


def _spread(layer: nn.Module, outputs: Tensor, deviation: float, mean: float) -> None:
    """Give each channel this deviation and mean over the outputs (C, M) that it had."""
    scale = deviation / outputs.std(dim=1)
    layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias.copy_((layer.bias - outputs.mean(dim=1)) * scale + mean)
