"""``section.key=value`` overrides of a recipe, and the sections there are.

detectron2's own override parser accepts a misspelt section silently and refuses paths with brackets or commas, so keys
are checked against the tree here and values are read as YAML.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from pipeline.errors import RecipeError

SECTIONS = ("model", "dataset", "training", "distiller", "export", "parity", "serving", "benchmark")


def apply_overrides(config: Any, overrides: Sequence[str]) -> None:
    """Change the lazy tree of a recipe in place.

    Args:
        config: the sections, as LazyConfig loads them.
        overrides: ``section.key=value`` with a YAML value. ``distiller=<name>`` replaces the whole section and is
            applied first, wherever it stands.

    Raises:
        RecipeError: an unknown section or key, or a value that cannot be read.
    """
    pairs = [_split(override) for override in overrides]
    for key, text in sorted(pairs, key=lambda pair: pair[0] != "distiller"):
        _apply(config, key, text)


def target_of(node: Any) -> Any:
    """What a lazy call calls, imported; None for anything else."""
    target = node.get("_target_") if _is_dict(node) else None
    return located(target) if isinstance(target, str) else target


def located(dotted: Any) -> Any:
    """The object of a dotted name."""
    from detectron2.utils.registry import locate

    try:
        return locate(dotted) if isinstance(dotted, str) else dotted
    except Exception as error:
        raise RecipeError(f"recipe: cannot import {dotted!r} ({one_line(error)})") from error


def one_line(message: object) -> str:
    """Another library's message as part of ours."""
    return " ".join(str(message).split())


def suggestion(name: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest one and all there are."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return (f", did you mean {close[0]!r}? There are " if close else "; there are ") + ", ".join(sorted(valid))


def _split(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RecipeError(
            f"override {override!r} has no '='; write section.key=value, for example training.max_iter=100"
        )
    section, dot, _ = key.partition(".")
    if section not in SECTIONS:
        raise RecipeError(f"override {override!r}: unknown section {section!r}{suggestion(section, SECTIONS)}")
    if not dot and section != "distiller":
        raise RecipeError(
            f"override {override!r} would replace the whole section {section}; set its keys: {section}.key=value"
        )
    return key, text


def _apply(config: Any, key: str, text: str) -> None:
    from omegaconf import OmegaConf

    if key == "distiller":
        config["distiller"] = _distiller(text.strip())
        return
    _check_key(config, key)
    value = _value(key, text)
    if key.startswith("model."):
        _check_model_value(key, OmegaConf.to_container(config, resolve=False), value)
    try:
        OmegaConf.update(config, key, value, merge=not isinstance(value, dict), force_add=True)
    except Exception as error:
        raise RecipeError(f"override {key}={text}: {one_line(error)}") from error


def _distiller(name: str) -> Any:
    """The section of a distiller given by name, with its defaults."""
    from detectron2.config import LazyCall

    distillers = importlib.import_module("training.distillers").DISTILLERS
    if name not in distillers:
        raise RecipeError(f"unknown distiller {name!r}{suggestion(name, distillers)}")
    return LazyCall(distillers[name])()


def _check_key(config: Any, key: str) -> None:
    """Follow the key through the tree; every part must be there already, or be a field of the dataclass."""
    node, parts = config, key.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        target = target_of(node)
        if _is_dict(node):
            valid = [str(name) for name in node if name != "_target_"]
            if dataclasses.is_dataclass(target):
                valid = [field.name for field in dataclasses.fields(target)]
        elif _is_list(node):
            valid = [str(index) for index in range(len(node))]
        else:
            raise RecipeError(f"override {key}: {where} is a value without keys; write {where}=value")
        if part not in valid:
            raise RecipeError(f"override {key}: {where} has no key {part!r}{suggestion(part, valid)}")
        missing = _is_dict(node) and part not in node
        node = None if missing else node[int(part)] if _is_list(node) else node[part]
        if missing and depth + 1 < len(parts):
            raise RecipeError(
                f"override {key}: {'.'.join(parts[: depth + 1])} is not set in the recipe, so it has no keys"
            )


def _value(key: str, text: str) -> Any:
    """The YAML value of an override. Text stays as typed: a path may hold spaces, '#', ': ' or commas."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    stripped = text.strip()
    try:
        container: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={stripped}"]), resolve=False)
        value = container["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        if stripped[:1] in ("[", "{", "'", '"'):
            raise RecipeError(f"override {key}={text}: not a YAML value ({one_line(error)})") from error
        return stripped
    if isinstance(value, str) and stripped[:1] not in ("'", '"'):
        return stripped
    if isinstance(value, dict | list) and stripped[:1] not in ("[", "{"):
        return stripped
    return value


def _check_model_value(key: str, tree: Any, value: Any) -> None:
    """A value of the model tree has no type hint; the value it replaces says what kind is meant."""
    old = tree
    for part in key.split("."):
        old = old[int(part)] if isinstance(old, list) else old[part]
    kind = next((kind for kind in (bool, (int, float), str, list, dict) if isinstance(old, kind)), None)
    is_reference = isinstance(old, str) and old.startswith("${")
    if kind is None or value is None or is_reference:
        return
    if not isinstance(value, kind) or isinstance(value, bool) != isinstance(old, bool):
        raise RecipeError(f"override {key}: found {value!r}, expected a value like {old!r}")


def _is_dict(node: Any) -> bool:
    from omegaconf import DictConfig

    return isinstance(node, DictConfig)


def _is_list(node: Any) -> bool:
    from omegaconf import ListConfig

    return isinstance(node, ListConfig)
