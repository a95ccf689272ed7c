"""Recipes: real LazyConfig files and overrides; everything misspelt or of a wrong type is refused with a suggestion."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.config import instantiate

from export.config import ExportConfig
from pipeline import recipe as recipe_module
from pipeline.errors import RecipeError
from pipeline.recipe import RECIPES_DIR, Recipe, available, load
from pipeline.typed import convert
from serving.config import ServingConfig

CONFIGS = """
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    train: str | None = None
    num_train: int = 2000

@dataclass(frozen=True, kw_only=True)
class Optimizer:
    momentum: float = 0.9

@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    num_iters: int
    learning_rate: float = 0.01
    steps: tuple[int, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: bool = False
    weights: Path | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self):
        if self.num_iters < 1:
            raise ValueError(f"num_iters is {self.num_iters}, expected at least 1")

@dataclass(frozen=True, kw_only=True)
class Lgd:
    loss_weight: float = 1.0
    num_heads: int = 8

@dataclass(frozen=True, kw_only=True)
class Nothing:
    pass

@dataclass(frozen=True, kw_only=True)
class Section:
    canvas: tuple[int, int] = (64, 96)
    limits: dict[str, float] = field(default_factory=dict)
    max_batch_size: int | float | None = None
"""

RECIPE = '''"""A toy recipe."""
from types import SimpleNamespace
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.resnet import ResNet
from toy_configs import DatasetConfig, Lgd, Optimizer, Section, TrainingConfig

_num_iters = 10
model = L(SimpleNamespace)(
    stem=L(BasicStem)(in_channels=3, out_channels=8, norm="BN"),
    make_stage=ResNet.make_stage, shape=ShapeSpec(channels=4), sizes=[[8, 16], [32, 64]],
    top_k=1000, threshold=0.05, same="${.top_k}", vis=None,
)
dataset = L(DatasetConfig)()
training = L(TrainingConfig)(num_iters=_num_iters, optimizer=L(Optimizer)(momentum=0.8))
distiller = L(Lgd)(loss_weight=2.0)
export = L(Section)()
parity = L(Section)(limits={"ap": 1})
serving = L(Section)(max_batch_size="${model.top_k}")
benchmark = L(Section)()
'''


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "toy_configs.py").write_text(CONFIGS)
    (tmp_path / "toy.py").write_text(RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    import toy_configs

    import training.distillers

    names = {"lgd": toy_configs.Lgd, "none": toy_configs.Nothing}
    monkeypatch.setattr(training.distillers, "DISTILLERS", names, raising=False)
    yield tmp_path / "toy.py"
    del sys.modules["toy_configs"]


def _refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_is_loaded_with_instantiated_sections_and_a_lazy_model(path: Path) -> None:
    recipe = load(path)
    assert recipe.name == "toy"
    assert recipe.sections["training"].num_iters == 10
    assert recipe.sections["training"].optimizer.momentum == 0.8
    assert recipe.sections["export"].canvas == (64, 96)
    assert recipe.sections["parity"].limits == {"ap": 1.0}
    assert recipe.sections["serving"].max_batch_size == 1000
    assert "model" not in recipe.sections
    assert instantiate(recipe.model).stem.out_channels == 8


def test_the_resolved_sections_are_json_with_callables_as_dotted_names(path: Path) -> None:
    recipe = load(path)
    assert json.loads(json.dumps(recipe.resolved)) == recipe.resolved
    model = recipe.section_json("model")
    assert model["stem"]["_target_"] == "detectron2.modeling.backbone.resnet.BasicStem"
    assert model["make_stage"] == "detectron2.modeling.backbone.resnet.ResNet.make_stage"
    assert model["shape"]["channels"] == 4
    assert model["same"] == 1000
    assert recipe.section_json("training")["_target_"] == "toy_configs.TrainingConfig"
    assert recipe.section_json("training")["learning_rate"] == 0.01, "defaults are part of the section"
    assert load(path).resolved == recipe.resolved


def test_overrides_are_yaml_values_of_the_type_the_field_states(path: Path) -> None:
    training = load(
        path,
        [
            "training.num_iters=20",
            "training.learning_rate=1e-3",
            "training.steps=[5, 8]",
            "training.device=cpu",
            "training.amp=true",
            "training.weights=/models/r18.pth",
            "training.optimizer.momentum=0",
        ],
    ).sections["training"]
    assert (training.num_iters, training.learning_rate, training.steps) == (20, 0.001, (5, 8))
    assert (training.device, training.amp, training.weights) == ("cpu", True, Path("/models/r18.pth"))
    assert training.optimizer.momentum == 0.0
    assert isinstance(training.optimizer.momentum, float)
    assert load(path, ["export.limits={ap: 1, ar: 2.5}"]).sections["export"].limits == {"ap": 1.0, "ar": 2.5}


@pytest.mark.parametrize(
    "text",
    [
        "/data/x y.json",
        "/data/COCO (2017)/a,b.json",
        "/data/a #1/b.json",
        "/data/a: b.json",
        "a=b",
        "host:8001",
    ],
)
def test_a_path_arrives_as_it_was_typed(path: Path, text: str) -> None:
    assert load(path, [f"dataset.train={text}"]).sections["dataset"].train == text


def test_quotes_and_null_mean_what_they_mean_in_yaml(path: Path) -> None:
    assert load(path, ["dataset.train='12'"]).sections["dataset"].train == "12"
    assert load(path, ["dataset.train=x", "dataset.train=null"]).sections["dataset"].train is None


def test_keys_of_the_model_tree_can_be_set_but_not_invented(path: Path) -> None:
    model = load(path, ["model.stem.out_channels=16", "model.sizes.1=[1, 2]", "model.vis=3", "model.same=5"]).model
    assert (model.stem.out_channels, list(model.sizes[1]), model.vis, model.same) == (16, [1, 2], 3, 5)
    assert "no key 'out_chanels', did you mean 'out_channels'?" in _refused(path, "model.stem.out_chanels=16")
    assert "no key '7'" in _refused(path, "model.sizes.7=1")
    assert "expected a value like 1000" in _refused(path, "model.top_k=many")
    assert "expected a value like 1000" in _refused(path, "model.top_k=true")
    assert "would replace the whole section" in _refused(path, "model=x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainig.num_iters=1", "unknown section 'trainig', did you mean 'training'? There are benchmark, dataset"),
        ("training.num_iter=1", "training has no key 'num_iter', did you mean 'num_iters'? There are amp, device"),
        ("training.optimizer.momentun=1", "did you mean 'momentum'?"),
        ("training.num_iters.x=1", "training.num_iters is a value without keys"),
        ("training._target_=os.system", "no key '_target_'"),
        ("training.num_iters", "has no '='"),
        ("=3", "has no '='"),
        ("training=3", "would replace the whole section"),
        ("training.num_iters=many", "training.num_iters: found 'many' (str), expected int"),
        ("training.num_iters=1.5", "training.num_iters: found 1.5 (float), expected int"),
        ("training.num_iters=true", "found True (bool), expected int"),
        ("training.num_iters=", "found None (NoneType), expected int"),
        ("training.num_iters=0", "training: num_iters is 0, expected at least 1"),
        ("training.amp=1", "found 1 (int), expected bool"),
        ("training.learning_rate=false", "found False (bool), expected float"),
        ("training.steps=[1, a]", "found [1, 'a'] (list), expected tuple[int, ...]"),
        ("training.device=tpu", "expected one of 'auto', 'cpu', 'cuda'"),
        ("training.optimizer.momentum=x", "training.optimizer.momentum: found 'x' (str), expected float"),
        ("dataset.train=3", "found 3 (int), expected str or null"),
        ("export.canvas=[1, 2, 3]", "expected tuple[int, int]"),
        ("export.canvas=[1, 2", "not a YAML value"),
        ("export.limits={ap: high}", "expected dict[str, float]"),
        ("distiller=lgb", "unknown distiller 'lgb', did you mean 'lgd'? There are lgd, none"),
        ("dataset.train=${nowhere}", "nowhere"),
    ],
)
def test_a_wrong_override_is_refused_in_one_paragraph(path: Path, override: str, message: str) -> None:
    assert message in _refused(path, override)


def test_a_distiller_name_replaces_the_whole_section_wherever_it_stands(path: Path) -> None:
    assert type(load(path, ["distiller=none"]).sections["distiller"]).__name__ == "Nothing"
    for overrides in (
        ["distiller=lgd", "distiller.num_heads=4"],
        ["distiller.num_heads=4", "distiller=lgd"],
    ):
        distiller = load(path, overrides).sections["distiller"]
        assert (distiller.num_heads, distiller.loss_weight) == (4, 1.0), "the recipe's own loss_weight is gone"
    assert load(path).sections["distiller"].loss_weight == 2.0
    assert "no key 'loss_weight'" in _refused(path, "distiller=none", "distiller.loss_weight=1")


def test_an_error_in_the_file_is_named_with_its_line_and_leaves_python_as_it_was(path: Path) -> None:
    original = builtins.__import__
    for bad, line, message in (
        ("1 / 0", 2, "ZeroDivisionError: division by zero"),
        ("import no_such_module", 2, "ModuleNotFoundError"),
        ("def (", 2, "SyntaxError"),
    ):
        path.write_text(f"'''doc'''\n{bad}\n")
        assert f"toy.py, line {line}: {message}" in _refused(path)
    assert builtins.__import__ is original


def test_an_unknown_detector_or_backbone_lists_those_that_exist(path: Path) -> None:
    path.write_text("from pipeline.recipe_parts import resnet, retinanett\n")
    message = _refused(path)
    assert "line 1: ImportError: cannot import name 'retinanett'" in message
    assert "did you mean 'retinanet'?" in message
    for part in ("atss", "faster_rcnn", "fcos", "gfl", "mask_rcnn", "paper_fcos", "resnext101_32x8d", "swin_tiny"):
        assert f" {part}," in message
    path.write_text("from pipeline.recipe_parts import vgg\n")
    assert "; there are " in _refused(path)
    path.write_text("from math import vgg\n")
    assert "retinanet" not in _refused(path)


def test_missing_and_misspelt_sections_of_the_file_are_refused(path: Path) -> None:
    path.write_text(RECIPE.replace("\nbenchmark = L(Section)()", ""))
    assert "lacks the section benchmark" in _refused(path)
    path.write_text(RECIPE.replace("\nbenchmark =", "\nbenchmarks ="))
    assert "unknown section 'benchmarks', did you mean 'benchmark'?" in _refused(path)
    path.write_text(RECIPE.replace("benchmark = L(Section)()", "benchmark = dict(a=1)"))
    assert "section benchmark is not a lazy call of a configuration dataclass" in _refused(path)


def test_misspelt_and_missing_keys_of_the_file_are_refused(path: Path) -> None:
    path.write_text(RECIPE.replace("num_iters=_num_iters", "num_iter=_num_iters"))
    assert "training has no key 'num_iter', did you mean 'num_iters'?" in _refused(path)
    path.write_text(RECIPE.replace("num_iters=_num_iters, ", ""))
    assert "training lacks num_iters" in _refused(path)


def test_what_has_no_stable_name_cannot_be_in_a_recipe(path: Path) -> None:
    path.write_text(RECIPE.replace("vis=None", "vis=lambda x: x"))
    assert "no stable name" in _refused(path)


def test_an_unknown_recipe_lists_those_that_exist(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(recipe_module, "RECIPES_DIR", path.parent)
    assert load("toy").path == path
    with pytest.raises(RecipeError, match="no recipe 'toyy', did you mean 'toy'"):
        load("toyy")
    with pytest.raises(RecipeError, match=r"no recipe file /nowhere/toy\.py; give an existing file, .* or one of toy"):
        load("/nowhere/toy.py")


def test_the_command_reproduces_the_recipe(path: Path) -> None:
    command = load(path, ["dataset.train=/data/x y.json"]).command
    assert command == f"python -m pipeline run {path} 'dataset.train=/data/x y.json'"
    named = Recipe(name="embedded", path=RECIPES_DIR / "embedded.py", overrides=("distiller=none",))
    assert named.command == "python -m pipeline run embedded distiller=none"


@pytest.mark.parametrize("given", ["[75,120]", "['75','120']", "['75',120]"])
def test_architectures_can_be_given_as_numbers(given: str) -> None:
    recipe = load(str(Path(__file__).with_name("tiny_recipe.py")), [f"export.compute_capabilities={given}"])
    assert recipe.sections["export"].compute_capabilities == ("75", "120")
    assert recipe.section_json("export")["compute_capabilities"] == ["75", "120"], "one fingerprint for both"


def test_only_a_list_takes_whole_numbers_for_texts() -> None:
    with pytest.raises(RecipeError, match=r"export\.compute_capabilities: found \[7\.5\]"):
        convert("export", ExportConfig, {"compute_capabilities": [7.5]})
    with pytest.raises(RecipeError, match=r"serving\.model_name: found 3 \(int\), expected str"):
        convert("serving", ServingConfig, {"model_name": 3})


@pytest.mark.parametrize("name", available())
def test_every_recipe_of_the_project_loads(name: str) -> None:
    load(name)
