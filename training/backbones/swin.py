"""detectron2's Swin Transformer with a forward pass that exports for batches of any size.

The stock one computes the batch size in floating point when it joins its windows, which fixes it in an exported graph.
Modules, parameters and their names are the stock ones; only the walk through them is written anew.

Shape legend: N images, H x W cells of a stage, Hp x Wp the same padded to whole windows of S x S cells, M windows an
image, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.swin import SwinTransformer, SwinTransformerBlock
from torch import Tensor

_BLOCKED = -100.0  # added to an attention logit


class Swin(SwinTransformer):
    """Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021.

    Deviation from detectron2: stages that are frozen drop no paths in training, as in the authors' code.

    Args:
        embed_dim: channels of the first stage; they double with each.
        depths: blocks of each stage.
        num_heads: of each stage.
        window_size: S.
        drop_path_rate: of the last block; it grows linearly from zero at the first.
        out_indices: the stages that are returned, as ``p0`` (stride 4) to ``p3`` (stride 32).
        frozen_stages: -1 trains everything, 0 freezes the patch embedding, i + 1 the first i stages too.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        window_size: int = 7,
        drop_path_rate: float = 0.2,
        out_indices: tuple[int, ...] = (0, 1, 2, 3),
        frozen_stages: int = -1,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            drop_path_rate=drop_path_rate,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
        )
        self._size_divisibility = 0  # any size; the stock class misspells the attribute that it reads

    def train(self, mode: bool = True) -> Swin:
        super().train(mode)
        self._freeze_stages()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, height, width) normalised images to ``{"p<i>": (N, C, H, W)}``."""
        x = self.patch_embed(images)
        height, width = x.shape[-2:]
        x = self.pos_drop(x.flatten(2).transpose(1, 2))
        maps = {}
        for i, layer in enumerate(self.layers):
            mask = shift_mask(height, width, layer.window_size, layer.shift_size, x.device)
            for block in layer.blocks:
                x = _block(block, x, height, width, mask)
            if i in self.out_indices:
                out = self.get_submodule(f"norm{i}")(x)
                maps[f"p{i}"] = out.unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous()
            if layer.downsample is not None:
                x = layer.downsample(x, height, width)
                height, width = (height + 1) // 2, (width + 1) // 2
        return maps


def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(M, S^2, S^2) added to the logits of shifted windows: cells that only the shift brought together are blocked."""
    # A shifted axis has three stretches: whole windows, the rest of the last one, and what was wrapped around.
    stretches = []
    for size in (height, width):
        padded = -(-size // window) * window
        cells = torch.arange(padded, device=device)
        stretches.append((cells >= padded - window).int() + (cells >= padded - shift).int())
    regions = _windows((3 * stretches[0][:, None] + stretches[1])[None, :, :, None], window).squeeze(-1)
    return torch.where(regions[:, :, None] == regions[:, None, :], 0.0, _BLOCKED)


def _block(block: SwinTransformerBlock, x: Tensor, height: int, width: int, mask: Tensor) -> Tensor:
    """(N, H W, C) through one block."""
    window, shift = block.window_size, block.shift_size
    below, right = -height % window, -width % window
    cells = F.pad(block.norm1(x).unflatten(1, (height, width)), (0, 0, 0, right, 0, below))
    if shift > 0:
        cells = cells.roll((-shift, -shift), (1, 2))
    attended = block.attn(_windows(cells, window), mask if shift > 0 else None)
    rows, columns = (height + below) // window, (width + right) // window
    cells = attended.view(-1, rows, columns, window, window, x.shape[-1]).transpose(2, 3)
    cells = cells.reshape(-1, rows * window, columns * window, x.shape[-1])
    if shift > 0:
        cells = cells.roll((shift, shift), (1, 2))
    x = x + block.drop_path(cells[:, :height, :width].flatten(1, 2))
    return x + block.drop_path(block.mlp(block.norm2(x)))


def _windows(cells: Tensor, window: int) -> Tensor:
    """(N, Hp, Wp, C) to (N M, S^2, C)."""
    _, height, width, channels = cells.shape
    cells = cells.reshape(-1, height // window, window, width // window, window, channels)
    return cells.transpose(2, 3).reshape(-1, window * window, channels)
