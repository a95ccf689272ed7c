"""What makes a step faster on the same hardware: reduced precision and compiled modules, and what each needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from torch import Tensor, nn

from training.config import TrainingConfig
from training.distilled_detector import bottom_up
from training.evaluate import DeviceUnavailable


class CompilerMissing(RuntimeError):
    """``training.compile`` is asked for and this machine cannot compile."""

    exit_code = 4


def check_precision(config: TrainingConfig, device: torch.device) -> None:
    """Refuse a precision that ``device`` does not have.

    Raises:
        DeviceUnavailable: half precision on a CPU, or bfloat16 on a GPU that lacks it.
    """
    if config.precision == "fp16" and device.type == "cpu":
        raise DeviceUnavailable(
            "training.precision=fp16 needs a GPU and training runs on the CPU; use training.precision=fp32 or bf16"
        )
    if (
        config.precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise DeviceUnavailable(
            f"training.precision=bf16, which {torch.cuda.get_device_name(device)} does not compute with; use "
            "training.precision=fp16 or fp32"
        )


def keep_predictions_in_float32(student: nn.Module) -> None:
    """Under autocast, hand what the student's predictors give to its losses in float32.

    Convolutions run in the reduced type; logits, box deltas and what is computed of them (focal loss, IoU, decoded
    boxes, sampling of proposals) do not. Without autocast nothing changes.
    """
    for predictor in _predictors(student):
        predictor.register_forward_hook(_in_float32)


def _predictors(student: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(student, GeneralizedRCNN):
        yield student.head
        return
    yield student.proposal_generator.rpn_head
    heads = student.roi_heads
    box_predictors = heads.box_predictor if isinstance(heads.box_predictor, nn.ModuleList) else [heads.box_predictor]
    yield from box_predictors
    if getattr(heads, "mask_on", False):
        yield heads.mask_head.predictor


def _in_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    return _as_float32(output)


def _as_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    if isinstance(value, list | tuple):
        return type(value)(_as_float32(item) for item in value)
    return value


def compile_student(student: nn.Module) -> None:
    """Compile the two parts that take most of a step: the network below the pyramid and the one-stage head.

    In place, so the keys of the state dict stay. The sizes of images vary, hence dynamic shapes.

    Raises:
        CompilerMissing: torch cannot compile on this machine.
    """
    check_compiler(next(student.parameters()).device)
    bottom_up(student).compile(dynamic=True)
    if not isinstance(student, GeneralizedRCNN):
        student.head.compile(dynamic=True)


def check_compiler(device: torch.device) -> None:
    """Compile and run one addition.

    Raises:
        CompilerMissing: that failed; says why.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CompilerMissing(
            f"training.compile=true, but torch cannot compile for {device.type} on this machine: {reason}. Install a "
            "C++ compiler (g++) and Python's headers, or use training.compile=false"
        ) from error
