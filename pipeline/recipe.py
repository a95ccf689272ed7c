"""Recipes: load a detectron2 LazyConfig file, apply overrides, refuse what is misspelt or of a wrong type.

The run folder of a model that was trained elsewhere holds its own recipe, ``own_model.yaml``, and is loaded by its
path.

A recipe has exactly the sections in ``SECTIONS``. ``model`` is detectron2's own lazy tree; the others are lazy calls of
frozen dataclasses. Nothing heavy is imported before :func:`load` is called.
"""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import os
import re
import shlex
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.overrides import SECTIONS, apply_overrides, located, one_line, suggestion, target_of
from pipeline.typed import convert

RECIPES_DIR = Path(__file__).resolve().parent / "recipes"
FOLDER_RECIPE = "own_model.yaml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete description of one deployment.

    Attributes:
        name: names the run's folder.
        overrides: as given on the command line.
        options: of the command line, such as the run's folder; they do not change what is computed.
        launch: the command that starts the processes of the train stage; None: it trains in the runner's own process.
            No part of the fingerprint: it says where the recipe is trained, as the machine does.
        model: detectron2's lazy tree, for ``detectron2.config.instantiate``.
        sections: the instantiated dataclass of every other section, by name.
        resolved: the plain JSON form of every section, ``model`` included; callables as dotted names.
    """

    name: str
    path: Path
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    launch: str | None = None
    model: Any = None
    sections: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resolved: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """The run folder that the recipe lies in; None for a recipe that is run into ``runs/<name>``."""
        return self.path.parent if self.path.name == FOLDER_RECIPE else None

    def section_json(self, name: str) -> Any:
        """The resolved section as plain JSON, for fingerprints and the report."""
        return self.resolved[name]

    @property
    def command(self) -> str:
        """The command line that runs this recipe."""
        given = self.name if self.path.parent == RECIPES_DIR else str(self.folder or self.path)
        launch = () if self.launch is None else ("--launch", self.launch)
        return shlex.join(["python", "-m", "pipeline", "run", given, *self.overrides, *self.options, *launch])


def available() -> list[str]:
    """Names of the recipes that come with the project."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.py") if not path.stem.startswith("_"))


def load(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe.

    Args:
        path_or_name: a file, the name of one in ``pipeline/recipes``, or a run folder with a recipe of its own.
        overrides: see :func:`pipeline.overrides.apply_overrides`.

    Raises:
        RecipeError: anything in the file or an override is wrong.
    """
    path = _find(str(path_or_name))
    config = executed(path, "recipe")
    _check_sections(path, config)
    apply_overrides(config, overrides)
    return from_sections(config, path, overrides)


def from_sections(config: Any, path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of these sections, every value checked; ``overrides`` are already applied.

    Raises:
        RecipeError: names the key.
    """
    sections = {name: _instantiated(path, name, config) for name in SECTIONS if name != "model"}
    resolved = {
        name: {"_target_": _dotted(type(section)), **_json(section, name)} for name, section in sections.items()
    }
    resolved["model"] = _json(_container(path, config, "model"), "model")
    return Recipe(
        name=path.parent.name if path.name == FOLDER_RECIPE else path.stem,
        path=path,
        overrides=tuple(overrides),
        model=config["model"],
        sections=sections,
        resolved=resolved,
    )


def save(recipe: Recipe) -> None:
    """Write a recipe that lies in a run folder to its file, overrides included; the file is whole or the one before.

    Raises:
        RecipeError: its model cannot be written.
    """
    from detectron2.config import LazyConfig
    from omegaconf import OmegaConf

    content = {"model": recipe.model, **{name: recipe.resolved[name] for name in SECTIONS if name != "model"}}
    partial = recipe.path.with_name(f"partial-{recipe.path.name}")
    try:
        LazyConfig.save(OmegaConf.create(content, flags={"allow_objects": True}), str(partial))
        if (pickled := partial.with_name(f"{partial.name}.pkl")).exists():  # what detectron2 does when YAML cannot
            pickled.unlink()
            raise RecipeError("the model holds what YAML cannot, such as a lambda; use something that can be imported")
        os.replace(partial, recipe.path)
    finally:
        partial.unlink(missing_ok=True)


def _find(path_or_name: str) -> Path:
    if path_or_name in available():
        return RECIPES_DIR / f"{path_or_name}.py"
    path = Path(path_or_name).absolute()
    if (path / FOLDER_RECIPE).is_file():
        return path / FOLDER_RECIPE
    if path_or_name.endswith(".py") or "/" in path_or_name:
        if not path.is_file():
            raise RecipeError(
                f"no recipe file {path}; give an existing file, a folder that `export` wrote, or one of "
                f"{', '.join(available())}"
            )
        return path
    raise RecipeError(f"no recipe {path_or_name!r}{suggestion(path_or_name, available())}")


def executed(path: Path, kind: str) -> Any:
    """Load a LazyConfig file; ``kind`` is what messages call it.

    Raises:
        RecipeError: it cannot be executed or parsed; names the line.
    """
    from detectron2.config import LazyConfig

    original_import = builtins.__import__
    try:
        return LazyConfig.load(str(path))
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = cause.lineno if isinstance(cause, SyntaxError) else frames[-1].lineno if frames else 1
        what = cause.msg if isinstance(cause, SyntaxError) else cause
        message = f"{kind} {path}, line {line}: {type(cause).__name__}: {one_line(what)}{_valid_parts(cause)}"
        raise RecipeError(message) from error
    finally:
        builtins.__import__ = original_import  # LazyConfig leaves its own in place when the file raises


def _valid_parts(error: BaseException) -> str:
    """What a misspelt detector, backbone or other part of ``pipeline.recipe_parts`` may be; empty for other errors."""
    unknown = re.match(r"cannot import name '(\w+)'", str(error))
    if not isinstance(error, ImportError) or error.name != "pipeline.recipe_parts" or unknown is None:
        return ""
    return suggestion(unknown[1], importlib.import_module("pipeline.recipe_parts").__all__)


def _check_sections(path: Path, config: Any) -> None:
    for name in config:
        if name not in SECTIONS:
            raise RecipeError(
                f"recipe {path}: unknown section {name!r}{suggestion(name, SECTIONS)}. "
                "A variable that only helps to build a section starts with an underscore."
            )
    missing = [name for name in SECTIONS if name not in config]
    if missing:
        raise RecipeError(f"recipe {path} lacks the section{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    for name in SECTIONS:
        target = target_of(config[name])
        if name != "model" and not dataclasses.is_dataclass(target):
            raise RecipeError(f"recipe {path}: section {name} is not a lazy call of a configuration dataclass")


def _instantiated(path: Path, name: str, config: Any) -> Any:
    """The section's dataclass, every value converted to the type its field states."""
    return _build(f"{name}", target_of(config[name]), _container(path, config, name))


def _build(where: str, cls: type, values: Mapping[str, Any]) -> Any:
    given = {key: value for key, value in values.items() if key != "_target_"}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in given:
        if key not in fields:
            raise RecipeError(f"recipe section {where} has no key {key!r}{suggestion(key, fields)}")
    required = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [n for n, f in fields.items() if (f.default, f.default_factory) == required and f.init and n not in given]
    if missing:
        raise RecipeError(f"recipe section {where} lacks {', '.join(missing)}, which {cls.__name__} has no default for")
    for key, value in given.items():
        if isinstance(value, Mapping) and "_target_" in value:
            given[key] = _build(f"{where}.{key}", located(value["_target_"]), value)
    try:
        return cls(**convert(where, cls, given))
    except ValueError as error:
        raise RecipeError(f"recipe section {where}: {one_line(error)}") from error


def _container(path: Path, config: Any, name: str) -> Any:
    """A section as plain containers, with references to other keys replaced by their values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(config[name], resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"recipe {path}, section {name}: {one_line(error)}") from error


def _json(value: Any, where: str) -> Any:
    """Plain JSON with callables as dotted names, so that equal recipes have equal text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _json(getattr(value, field.name), where) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item, where) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    text = _dotted(value) if callable(value) else repr(value)
    if " at 0x" in text or "<lambda>" in text or "<locals>" in text:
        raise RecipeError(f"recipe section {where}: {text} has no stable name; use something that can be imported")
    return text


def _dotted(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}" if hasattr(target, "__qualname__") else repr(target)
