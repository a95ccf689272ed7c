"""Compare configuration values with the type hints of the dataclass that takes them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

from pipeline.errors import RecipeError


class _Mismatch(Exception):
    """A value does not fit a hint."""


def convert(where: str, cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the fields of ``cls`` want them: lists become tuples, whole numbers floats or, in a tuple of texts,
    text; text becomes a path.

    Args:
        where: name of the section, for messages.

    Raises:
        RecipeError: a value is of another type than its field; names the key, what was found and what is expected.
    """
    hints = typing.get_type_hints(cls)
    converted = {}
    for key, value in values.items():
        try:
            converted[key] = _fit(hints[key], value)
        except _Mismatch:
            raise RecipeError(
                f"{where}.{key}: found {value!r} ({type(value).__name__}), expected {_words(hints[key])}"
            ) from None
    return converted


def _fit(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        return _need(any(value == choice and type(value) is type(choice) for choice in arguments), value)
    if origin in (Union, types.UnionType):
        return _fit_any(arguments, value)
    if origin is tuple or hint is tuple:
        return _fit_tuple(arguments, value)
    if origin is list:
        _need(isinstance(value, list | tuple), value)
        return [_fit(arguments[0], item) for item in value]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _need(isinstance(value, Mapping), value)
        return {_fit(arguments[0], key): _fit(arguments[1], item) for key, item in value.items()}
    if hint is type(None):
        return _need(value is None, value)
    return _fit_class(origin or hint, value)


def _fit_any(hints: tuple[Any, ...], value: Any) -> Any:
    # The type itself goes before what can be converted to it: 1 stays 1 for `float | int`.
    for hint in sorted(hints, key=lambda hint: type(value) is not hint):
        try:
            return _fit(hint, value)
        except _Mismatch:
            continue
    raise _Mismatch


def _fit_tuple(hints: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    _need(isinstance(value, list | tuple), value)
    if not hints:
        return tuple(value)
    if len(hints) == 2 and hints[1] is ...:
        # ``[75,80]`` on the command line is a list of numbers, whatever the field takes.
        texts = hints[0] is str
        return tuple(_fit(hints[0], str(item) if texts and type(item) is int else item) for item in value)
    _need(len(value) == len(hints), value)
    return tuple(_fit(hint, item) for hint, item in zip(hints, value, strict=True))


def _fit_class(hint: Any, value: Any) -> Any:
    if hint is float:
        _need(isinstance(value, int | float) and not isinstance(value, bool), value)
        return float(value)
    if hint is int:
        return _need(isinstance(value, int) and not isinstance(value, bool), value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type):
        return _need(isinstance(value, hint), value)
    return value


def _need(holds: bool, value: Any) -> Any:
    if not holds:
        raise _Mismatch
    return value


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, arguments))
    if dataclasses.is_dataclass(hint) or not arguments:
        return getattr(hint, "__name__", str(hint))
    return str(hint).replace("typing.", "")
