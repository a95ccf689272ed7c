"""How many multiplications of matrices a machine can do: what no network of convolutions can be faster than."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import torch
from contenders import Setting
from onnx import TensorProto, helper, numpy_helper

EDGE = 2048
OPERATIONS = 2 * EDGE**3
"""Of one product, a multiplication and an addition counting as two."""


def products(setting: Setting) -> dict[tuple[str, str], Callable[[], object]]:
    """A product of two square matrices by precision and library; on a GPU torch's alone."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, EDGE, EDGE), np.float32)
    x, y = (torch.from_numpy(each).to(setting.device) for each in (a, b))

    def of_torch() -> None:
        torch.mm(x, y)
        if setting.device.type == "cuda":
            torch.cuda.synchronize()

    found: dict[tuple[str, str], Callable[[], object]] = {("fp32", "torch"): of_torch}
    if setting.device.type == "cuda":
        return found
    activations = generator.integers(0, 256, (EDGE, EDGE), np.uint8)
    weights = generator.integers(-127, 128, (EDGE, EDGE), np.int8)
    signed, signed_weights = torch.from_numpy(activations.view(np.int8)), torch.from_numpy(weights)
    found["fp32", "ONNX Runtime"] = _of_onnxruntime(setting, "MatMul", a, b, TensorProto.FLOAT)
    found["int8", "torch"] = lambda: torch._int_mm(signed, signed_weights)
    found["int8", "ONNX Runtime"] = _of_onnxruntime(setting, "MatMulInteger", activations, weights, TensorProto.INT32)
    return found


def _of_onnxruntime(
    setting: Setting, operator: str, a: np.ndarray, b: np.ndarray, result: TensorProto.DataType
) -> Callable[[], object]:
    """The product with a constant second factor, as weights are."""
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        operator,
        [helper.make_tensor_value_info("a", helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)],
        [helper.make_tensor_value_info("c", result, (EDGE, EDGE))],
        [numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    session = setting.session(model.SerializeToString())
    return lambda: session.run(None, {"a": a})
