"""Modulated deformable residual blocks (DCNv2) through torchvision, under detectron2's parameter names.

detectron2's own ``DeformBottleneckBlock`` needs its compiled extension; this one needs torchvision only, and
checkpoints pass between the two.

Shape legend: N images, C bottleneck channels, H x W input and Ho x Wo output cells, K = 9 kernel taps in row order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

NUM_TAPS = 9  # of the 3x3 kernel


class ModulatedDeformableConv2d(Conv2d):
    """Zhu et al., "Deformable ConvNets v2", CVPR 2019, equation 1: every kernel tap is moved and weighted per location.

    detectron2's ``Conv2d`` in everything but ``forward``, its parameters' names and its norm included.
    """

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Convolve and normalise.

        Args:
            x: (N, C, H, W).
            offset: (N, 2 K, Ho, Wo), in input cells; channels 2k and 2k+1 move tap k down and to the right.
            mask: (N, K, Ho, Wo), the weight of each tap.
        """
        x = deform_conv2d(
            x, offset, self.weight, stride=self.stride, padding=self.padding, dilation=self.dilation, mask=mask
        )
        return x if self.norm is None else self.norm(x)


class DeformableBottleneckBlock(BottleneckBlock):
    """detectron2's bottleneck block with a modulated deformable 3x3 convolution.

    ``conv2_offset`` gives 27 channels: first the 18 offsets, then the 9 logits of the mask. detectron2 cuts them in
    three and calls the first two thirds ``offset_x`` and ``offset_y``, but joins them again before its kernel reads
    them as (down, right) pairs, tap by tap. torchvision reads the same pairs, so the channels are taken as they are.

    The offsets start at zero and the mask at one half: at first the convolution is half the plain one.

    Args:
        bottleneck_channels: of the 3x3 convolution.
        stride_in_1x1: the stride sits in the first 1x1 convolution, as in MSRA's ResNets, instead of the 3x3 one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: str = "BN",
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            bottleneck_channels=bottleneck_channels,
            stride=stride,
            num_groups=num_groups,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
        )
        plain = self.get_submodule("conv2")
        geometry = {"kernel_size": 3, "stride": plain.stride, "padding": plain.padding}
        self.conv2_offset = Conv2d(bottleneck_channels, 3 * NUM_TAPS, **geometry)
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)
        self.conv2 = ModulatedDeformableConv2d(
            bottleneck_channels, bottleneck_channels, groups=num_groups, bias=False, norm=plain.norm, **geometry
        )
        self.conv2.weight = plain.weight

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, Ho, Wo)."""
        out = F.relu_(self.conv1(x))
        out = self.conv3(F.relu_(self._deformed(out)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)

    def _deformed(self, x: Tensor) -> Tensor:
        """The 3x3 convolution, in float32 always: a bfloat16 offset of 40 cells is only known to a quarter of one."""
        if not torch.is_autocast_enabled(x.device.type):
            return self._moved_taps(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._moved_taps(x.float()).to(x.dtype)

    def _moved_taps(self, x: Tensor) -> Tensor:
        offset, mask = self.conv2_offset(x).split((2 * NUM_TAPS, NUM_TAPS), dim=1)
        return self.conv2(x, offset, mask.sigmoid())
