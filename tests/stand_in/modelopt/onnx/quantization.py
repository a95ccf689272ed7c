"""Stands in for NVIDIA ModelOpt's ONNX quantization where that is not installed: convolutions between Q/DQ nodes."""

from __future__ import annotations

import re

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static


class _Batches(CalibrationDataReader):
    def __init__(self, data: dict[str, np.ndarray]) -> None:
        ((name, images),) = data.items()
        self.batches = iter([{name: image[None]} for image in images])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantize(
    path: str,
    *,
    quantize_mode: str,
    calibration_data: dict[str, np.ndarray],
    calibration_method: str,
    calibration_eps: list[str],
    nodes_to_exclude: list[str],
    high_precision_dtype: str,
    output_path: str,
    log_level: str,
) -> None:
    assert (quantize_mode, calibration_eps, high_precision_dtype) == ("int8", ["cpu"], "fp32")
    names = [node.name for node in onnx.load(path).graph.node]
    quantize_static(
        path,
        output_path,
        _Batches(calibration_data),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv"],
        nodes_to_exclude=[name for name in names if any(re.match(pattern, name) for pattern in nodes_to_exclude)],
        extra_options={"ActivationSymmetric": True, "QuantizeBias": False},
    )
