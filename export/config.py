"""The recipe's ``export`` section."""

from __future__ import annotations

import dataclasses
from typing import Literal

NmsChoice = Literal["portable", "onnx", "outside"]
AS_EXPORTED = ("fp32", "tf32")
"""The precisions whose ONNX file is the exported one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What the exported detector looks like.

    Attributes:
        canvas: (H, W) of the graph's input in pixels, divisible by the backbone's stride.
        short_edge_pixels, max_edge_pixels: detectron2's ``ResizeShortestEdge`` rule, so that an image fits the canvas.
        canvases: more (H, W), each with an ONNX model of the same checkpoint and a row of its AP; images are resized to
            be as large as the canvas lets them be. Engine and server take ``canvas``.
        max_batch_size: largest batch of graph and engine; every size from 1 on is accepted.
        min_batch_size: smallest batch of the engine. Runners and this project's Python backend fill smaller ones up;
            Triton's own tensorrt backend refuses them.
        opt_batch_size: the batch that the engine is tuned for; None takes ``max_batch_size``.
        nms: where overlapping boxes of a class are dropped; the detections are the same. "portable": in the graph, with
            operators that every target has. "onnx": in the graph, as the operator ``NonMaxSuppression``, which
            TensorRT-RTX lacks. "outside": the model ends at the candidates, and runners and this project's Python
            backend do the rest; Triton's own backends cannot serve it.
        precision: of backbone, pyramid and heads; decoding and NMS are always float32. "fp32" and "tf32" (another way
            to multiply float32 on GPUs) take the exported file as it is; "fp16", "bf16", "int8" and "fp8" are written
            into it by NVIDIA ModelOpt (`make setup-precision`).
        num_calibration_images: training images that int8 and fp8 are calibrated on, spread over the set.
        compute_capabilities: GPU architectures to build the engine for, "75" is Turing (T4), "80" A100, "86" A10,
            "89" L4, "120" Blackwell RTX. TensorRT proper builds for the GPU it runs on.
    """

    canvas: tuple[int, int] = (256, 256)
    short_edge_pixels: int = 256
    max_edge_pixels: int = 256
    canvases: tuple[tuple[int, int], ...] = ()
    max_batch_size: int = 8
    min_batch_size: int = 1
    opt_batch_size: int | None = None
    nms: NmsChoice = "portable"
    precision: Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"] = "fp32"
    num_calibration_images: int = 512
    compute_capabilities: tuple[str, ...] = ("75", "80", "86", "89", "120")

    def __post_init__(self) -> None:
        # Overrides arrive as OmegaConf lists and, for ``[75,80]``, as integers.
        object.__setattr__(self, "canvas", tuple(int(edge) for edge in self.canvas))
        object.__setattr__(self, "canvases", tuple(tuple(int(edge) for edge in each) for each in self.canvases))
        object.__setattr__(self, "compute_capabilities", tuple(str(c) for c in self.compute_capabilities))
        if len(self.canvas) != 2 or min(self.canvas) < 1:
            raise ValueError(
                f"export.canvas is {self.canvas}, expected two positive numbers, (height, width) in pixels"
            )
        if any(len(each) != 2 or min(each) < 1 for each in self.canvases):
            raise ValueError(
                f"export.canvases is {self.canvases}, expected pairs of positive numbers, (height, width) in pixels"
            )
        if len({self.canvas, *self.canvases}) <= len(self.canvases):
            raise ValueError(
                f"export.canvases is {self.canvases} beside export.canvas {self.canvas}: each canvas can be there once"
            )
        if not 1 <= self.short_edge_pixels <= self.max_edge_pixels:
            raise ValueError(
                f"export.short_edge_pixels is {self.short_edge_pixels} and export.max_edge_pixels "
                f"{self.max_edge_pixels}, expected 1 <= short edge <= max edge"
            )
        for name in ("max_batch_size", "num_calibration_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"export.{name} is {getattr(self, name)}, expected at least 1")
        batches = (self.min_batch_size, self.opt_batch_size or self.max_batch_size, self.max_batch_size)
        if self.opt_batch_size == 0 or not 1 <= batches[0] <= batches[1] <= batches[2]:
            raise ValueError(
                f"export.min_batch_size is {self.min_batch_size}, export.opt_batch_size {self.opt_batch_size} and "
                f"export.max_batch_size {self.max_batch_size}, expected 1 <= min <= opt <= max"
            )
