"""Weight files of other projects, read without running code from them.

PyTorch files (both formats), safetensors, and the numpy pickles of detectron2's and Caffe2's model zoos.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

# What a numpy pickle needs; anything else in it could be a program.
_NUMPY_GLOBALS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar", "_frombuffer")
    ),
}
# Entries under which training codes keep the state dict; the first one found is taken.
_ENTRIES = ("model", "state_dict", "model_state", "model_ema")


class WeightsUnusable(ValueError):
    """Pretrained weights are missing, cannot be read or are not those of the architecture."""

    exit_code = 2


def read_weight_file(path: Path) -> dict[str, Any]:
    """The file's content.

    Raises:
        WeightsUnusable: there is no such file, it is damaged, or it holds more than tensors and plain values.
    """
    if not path.is_file():
        raise WeightsUnusable(
            f"pretrained weights not found: {path}; check training.init_checkpoint, or the backbone's weights in the "
            "recipe"
        )
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        elif path.suffix == ".pkl":
            with path.open("rb") as stream:
                content = _NumpyUnpickler(stream, encoding="latin1").load()
        else:
            content = _torch_content(path)
    except Exception as error:
        raise WeightsUnusable(f"{path} cannot be read as weights: {_first_sentence(error)}. {_advice(path)}") from error
    if not isinstance(content, dict):
        raise WeightsUnusable(f"{path} holds a {type(content).__name__}, expected a dict of tensors by name")
    return content


def state_dict_of(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a file's content, without the prefix ``module.`` that parallel training leaves.

    Raises:
        WeightsUnusable: there are none.
    """
    entry = next((content[name] for name in _ENTRIES if isinstance(content.get(name), Mapping)), content)
    state = {str(key): torch.as_tensor(value) for key, value in entry.items() if isinstance(value, Tensor | np.ndarray)}
    if not state:
        raise WeightsUnusable(
            f"{path} holds no tensors: expected a state dict, or one under {', '.join(map(repr, _ENTRIES))}; "
            f"found {', '.join(map(repr, list(content)[:5])) or 'nothing'}"
        )
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def first_names(names: Iterable[str], limit: int = 3) -> str:
    """The first few of many names, and how many more there are, for a message."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


class _NumpyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY_GLOBALS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not an array")
        return getattr(importlib.import_module(module), name)


def _torch_content(path: Path) -> Any:
    """``torch.load`` without code, numpy's scalars allowed: old training codes keep their metrics as such."""
    dtypes = [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "uint8", "bool")]
    multiarray: Any = importlib.import_module("numpy.core.multiarray")
    arrays = [multiarray._reconstruct, multiarray.scalar, np.ndarray, np.dtype]
    with torch.serialization.safe_globals([*arrays, *dtypes]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()).removeprefix("Weights only load failed. ")
    _, marker, cause = text.partition("WeightsUnpickler error: ")
    return ((cause if marker else text).split(". ")[0] or type(error).__name__).rstrip(".")


def _advice(path: Path) -> str:
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return "It is damaged or of another kind; get it again"
    if not objects:
        return "It is damaged; get it again"
    return (
        f"Besides tensors it holds {', '.join(objects)}, and loading those would run code from the file. Where you "
        "trust it and these can be imported, write a file of the tensors alone: "
        "torch.save({'model': torch.load('old.pth', weights_only=False)['model']}, 'new.pth')"
    )
