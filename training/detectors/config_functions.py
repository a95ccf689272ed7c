"""Functions that a LazyConfig file defines itself, such as the lambdas of detectron2's new baselines."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from typing import Any

import cloudpickle


def text_of(function: Callable[..., Any]) -> str:
    """The function as text for :func:`function_from`, under the same version of Python; equal functions, equal text."""
    getattr(function, "__globals__", {}).pop("__package__", None)  # LazyConfig makes up another one each time
    return base64.b64encode(cloudpickle.dumps(function)).decode("ascii")


def function_from(*, text: str) -> Callable[..., Any]:
    """The function again; like the configuration that it comes from, the text is code."""
    function: Callable[..., Any] = pickle.loads(base64.b64decode(text))
    return function
