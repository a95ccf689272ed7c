"""What a configuration of detectron2, yaml or LazyConfig, says about a detector and the images it was made for."""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import LazyCall, get_cfg
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import RecipeError
from pipeline.overrides import one_line, target_of
from pipeline.recipe import executed
from training.detectors.config_functions import function_from, text_of
from training.detectors.stock_fcos import stock_fcos
from training.detectors.yacs_detector import yacs_detector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detectron2Config:
    """One configuration.

    Attributes:
        model: the detector's lazy tree, as recipes have it.
        short_edge_pixels, max_edge_pixels: how detectron2 resizes test images; None where it says no
            ``ResizeShortestEdge``.
        dataset_name: of the test set, by detectron2's name; None where there is none.
    """

    model: Any
    short_edge_pixels: int | None
    max_edge_pixels: int | None
    dataset_name: str | None


def read_detectron2_config(path_or_name: str) -> Detectron2Config:
    """Read a configuration; like detectron2 itself, this runs code from it.

    Args:
        path_or_name: a file, or a name in detectron2's model zoo such as ``COCO-Detection/retinanet_R_50_FPN_1x.yaml``.

    Raises:
        RecipeError: there is none, it cannot be read, or it is not of a detector.
    """
    path = _find(path_or_name)
    is_lazy = path.suffix == ".py" or re.search(r"^model:", path.read_text(), re.MULTILINE)
    return _lazy(path) if is_lazy else _yacs(path)


def _find(path_or_name: str) -> Path:
    path = Path(path_or_name).absolute()
    if not path.is_file():
        zoo = Path(model_zoo.__file__).parent / "configs"
        path = zoo / path_or_name
        if not path.is_file():
            names = [str(file.relative_to(zoo)) for file in zoo.glob("*/*.*") if file.suffix in (".yaml", ".py")]
            close = difflib.get_close_matches(path_or_name, names, n=1)
            hint = f" did you mean {close[0]!r}?" if close else ""
            raise RecipeError(
                f"no configuration {path_or_name!r}, neither a file nor a name in detectron2's model zoo;{hint} Give a "
                "yaml or LazyConfig file, or a name such as COCO-Detection/retinanet_R_50_FPN_1x.yaml"
            )
    if path.suffix not in (".py", ".yaml", ".yml"):
        raise RecipeError(f"configuration {path}: expected a .yaml file, or a LazyConfig in a .py or .yaml file")
    return path


def _yacs(path: Path) -> Detectron2Config:
    config = get_cfg()
    try:
        config.merge_from_file(str(path))
        plain = yaml.safe_load(config.dump())
    except Exception as error:  # yacs fails in many ways
        unknown = (
            ". A project that adds keys of its own to detectron2's has to be given as a LazyConfig"
            if isinstance(error, KeyError)
            else ""
        )
        raise RecipeError(f"configuration {path}: {type(error).__name__}: {one_line(error)}{unknown}") from error
    family = config.MODEL.RETINANET if config.MODEL.META_ARCHITECTURE == "RetinaNet" else config.MODEL.ROI_HEADS
    resizes = config.INPUT.MIN_SIZE_TEST > 0  # 0: images are taken as they are
    return Detectron2Config(
        model=LazyCall(yacs_detector)(num_classes=family.NUM_CLASSES, config=plain),
        short_edge_pixels=config.INPUT.MIN_SIZE_TEST if resizes else None,
        max_edge_pixels=config.INPUT.MAX_SIZE_TEST if resizes else None,
        dataset_name=next(iter(config.DATASETS.TEST), None),
    )


def _lazy(path: Path) -> Detectron2Config:
    config = executed(path, "configuration")
    if "model" not in config:
        raise RecipeError(f"configuration {path} has no `model`; it has {', '.join(map(str, config)) or 'nothing'}")
    model = _on_its_own(path, config)
    _write_out_functions(path, model, "model")
    if "num_classes" not in model and "num_classes" not in (model.get("roi_heads") or {}):
        raise RecipeError(
            f"configuration {path}: neither model nor model.roi_heads has num_classes, so this is no RetinaNet, FCOS, "
            "Faster R-CNN or Mask R-CNN"
        )
    if target_of(model) is FCOS:  # the one that does not keep its channel order
        order = _selected(config, "dataloader.test.mapper.image_format")
        if order not in ("RGB", "BGR"):
            raise RecipeError(
                f"configuration {path}: dataloader.test.mapper.image_format is {order!r}, expected 'RGB' or 'BGR'; "
                "nothing else says which of them FCOS takes"
            )
        model["_target_"], model["input_format"] = stock_fcos, order
    steps = _selected(config, "dataloader.test.mapper.augmentations") or []
    resize: Any = next((step for step in steps if target_of(step) is ResizeShortestEdge), {})
    short, names = resize.get("short_edge_length"), _selected(config, "dataloader.test.dataset.names")
    return Detectron2Config(
        model=model,
        short_edge_pixels=short if short is None or isinstance(short, int) else short[0],
        max_edge_pixels=resize.get("max_size"),
        dataset_name=names if names is None or isinstance(names, str) else names[0],
    )


def _on_its_own(path: Path, config: Any) -> Any:
    """The model's tree without the rest of the configuration; references into that are replaced by their values."""
    flags = {"allow_objects": True}
    alone = OmegaConf.create({"model": config["model"]}, flags=flags)
    try:
        OmegaConf.to_container(alone, resolve=True)
        return alone["model"]
    except OmegaConfBaseException:
        pass
    try:
        values = OmegaConf.to_container(config["model"], resolve=True, structured_config_mode=SCMode.INSTANTIATE)
        return OmegaConf.create({"model": values}, flags=flags)["model"]
    except OmegaConfBaseException as error:
        raise RecipeError(f"configuration {path}: {one_line(error)}") from error


def _write_out_functions(path: Path, node: Any, where: str) -> None:
    """Replace functions that the file defines itself, which cannot be imported by a name, with calls that give them."""
    keys = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        value = None if OmegaConf.is_interpolation(node, key) else node[key]
        if isinstance(value, DictConfig | ListConfig):
            _write_out_functions(path, value, f"{where}.{key}")
        elif callable(value) and not _can_be_imported(value):
            if key == "_target_":
                raise RecipeError(
                    f"configuration {path}: {where} is made by {value.__name__}, which the file defines itself; define "
                    "it in a module of its own and import it"
                )
            node[key] = LazyCall(function_from)(text=text_of(value))


def _can_be_imported(value: Any) -> bool:
    if not hasattr(value, "__qualname__"):  # an object that can be called, such as a partial
        return True
    try:
        return bool(locate(f"{value.__module__}.{value.__qualname__}") == value)
    except Exception:  # detectron2 raises what each of its ways to look raises
        return False


def _selected(config: Any, key: str) -> Any:
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:  # a reference that leads nowhere
        return None
