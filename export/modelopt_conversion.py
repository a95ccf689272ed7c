"""Write a model's weights and layers in another precision with NVIDIA ModelOpt; runs by itself, as a tool.

    python -P export/modelopt_conversion.py JOB.json

ModelOpt needs other versions of ONNX and ONNX Runtime than the rest of the project, so both lie with it in a folder of
their own, which must come first on the tool's path (:mod:`export.precision` calls it so). Nothing of the project is
imported here.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx

LARGEST = 16384.0
"""A quarter of float16's largest number. ModelOpt's own 512 is for coordinates, which are absolute and in the tail."""


def autocast(source: str, target: str, precision: str, calibration: str, float32_nodes: list[str]) -> None:
    """fp16 or bf16: a layer whose inputs or outputs pass ``LARGEST`` on the calibration images stays float32."""
    from modelopt.onnx.autocast import convert_to_mixed_precision

    model = convert_to_mixed_precision(
        source,
        low_precision_type=precision,
        nodes_to_exclude=_patterns(float32_nodes),
        data_max=LARGEST,
        keep_io_types=True,
        calibration_data=calibration,
        providers=["cpu"],
    )
    onnx.save(model, target)


def quantize(source: str, target: str, precision: str, calibration: str, float32_nodes: list[str]) -> None:
    """int8 or fp8: Q/DQ nodes around the layers, scales from the calibration images, float32 between them.

    ModelOpt would make the rest float16. ONNX Runtime 1.31 then computes nonsense from an int8 file, unless its graph
    optimizations are off, so such a file could not be validated on a CPU.
    """
    from modelopt.onnx.quantization import quantize as quantize_onnx

    quantize_onnx(
        source,
        quantize_mode=precision,
        calibration_data=dict(np.load(calibration)),
        calibration_method="entropy" if precision == "int8" else "max",  # ModelOpt's fp8 scales are those of "max"
        calibration_eps=["cpu"],
        nodes_to_exclude=_patterns(float32_nodes),
        high_precision_dtype="fp32",
        output_path=target,
        log_level="ERROR",
    )


def _patterns(names: list[str]) -> list[str]:
    return [f"^{re.escape(name)}$" for name in names]


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    {"quantize": quantize, "autocast": autocast}[job["tool"]](**job["options"])
