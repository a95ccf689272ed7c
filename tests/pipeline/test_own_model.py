"""`export` of a detectron2 model that was trained elsewhere: what it takes, what it writes, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig

from export.detector_graph import detector_graph, signature_of
from export.parity import combined, match_detections
from export.runners import TorchRunner
from pipeline import recipe as recipes
from pipeline.own_model import prepared, recipe_and_detector
from pipeline.recipe import FOLDER_RECIPE
from tests.conformance.generated_datasets import CLASS_NAMES, overrides_for
from tests.export import conftest, tiny_two_stage
from tests.own_models import FAMILIES, OwnModel, command_line, own_model, stock_detector
from training.student import build_student


def manifest(run_dir: Path, stage: str) -> dict:
    return json.loads((run_dir / stage / "manifest.json").read_text())


@pytest.fixture(scope="module")
def retinanet(tmp_path_factory: pytest.TempPathFactory) -> OwnModel:
    return own_model("RetinaNet", tmp_path_factory.mktemp("retinanet"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_detects_what_it_detects_in_detectron2(family: str, tmp_path: Path) -> None:
    model = own_model(family, tmp_path)
    recipe, detector = prepared(str(model.config), model.weights, [], tmp_path / "run" / FOLDER_RECIPE)
    export, imported = recipe.sections["export"], recipe.sections["training"]
    assert (export.canvas, export.short_edge_pixels, export.max_edge_pixels) == ((96, 160), 96, 130)
    signature = signature_of(
        detector,
        canvas=export.canvas,
        short_edge=export.short_edge_pixels,
        max_edge=export.max_edge_pixels,
        class_names=imported.class_names,
        category_ids=imported.category_ids,
        max_batch_size=1,
    )
    reference = (tiny_two_stage if hasattr(detector, "roi_heads") else conftest).detectron2_detections
    with TorchRunner(detector_graph(detector, signature), signature) as runner:
        matching = combined(
            match_detections(
                reference(model.detector, canvas),
                runner.run(canvas[None])[0],
                score_threshold=signature.score_threshold,
                max_detections=signature.max_detections,
            )
            for canvas in conftest.canvases(*export.canvas, 2)
        )
    assert matching.num_unmatched == 0, matching
    assert matching.num_matched > 100
    assert signature.channel_order == "BGR"
    assert (signature.mask_size is not None) == ("Mask" in family)
    assert not (tmp_path / "run").exists(), "nothing is written before everything is checked"


def test_a_lazy_configuration_as_detectron2_saves_it_is_the_same(tmp_path: Path) -> None:
    model = own_model("FCOS, LazyConfig", tmp_path)
    saved = tmp_path / "config.yaml"
    LazyConfig.save(LazyConfig.load(str(model.config)), str(saved))
    for path in (model.config, saved):
        recipe, _ = prepared(str(path), model.weights, [], tmp_path / "run" / FOLDER_RECIPE)
        assert recipe.sections["export"].canvas == (96, 160)
        assert recipe.model.input_format == "BGR"


def test_references_out_of_the_model_and_functions_of_the_file_stay_what_they_are(tmp_path: Path) -> None:
    model = own_model("Mask R-CNN, LazyConfig", tmp_path)
    config = tmp_path / "more.py"
    config.write_text(
        f"{model.config.read_text()}\n"
        "from torch import nn\n"
        "own = dict(top=50)\n"
        'model.roi_heads.box_predictor.test_topk_per_image = "${own.top}"\n'
        "model.roi_heads.mask_head.conv_norm = lambda channels: nn.GroupNorm(4, channels, eps=1e-3)\n"
    )
    torch.save({"model": stock_detector(config).state_dict()}, model.weights)
    recipe, again = (prepared(str(config), model.weights, [], tmp_path / "run" / FOLDER_RECIPE)[0] for _ in range(2))
    assert recipe.resolved == again.resolved
    recipe.path.parent.mkdir()
    recipes.save(recipe)
    config.unlink()
    detector = build_student(recipes.load(recipe.path.parent).model, num_classes=3)
    assert detector.roi_heads.box_predictor.test_topk_per_image == 50
    assert detector.roi_heads.mask_head.mask_fcn1.norm.eps == 1e-3


def test_names_in_the_zoo_say_canvas_classes_and_their_names(tmp_path: Path) -> None:
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    weights = tmp_path / "model.pth"
    torch.save({"model": {"a": torch.zeros(1)}}, weights)
    recipe, _ = recipe_and_detector(name, weights, [], tmp_path / FOLDER_RECIPE)
    export, imported = recipe.sections["export"], recipe.sections["training"]
    assert (export.canvas, export.short_edge_pixels, export.max_edge_pixels) == ((800, 1344), 800, 1333)
    assert (imported.class_names[:2], imported.class_names[-1]) == (("person", "bicycle"), "toothbrush")
    assert (imported.category_ids[0], imported.category_ids[-1]) == (1, 90)
    assert imported.class_names_from == "those of coco_2017_val"


def test_a_canvas_of_ones_own_brings_the_edges_along(retinanet: OwnModel, tmp_path: Path) -> None:
    path = tmp_path / FOLDER_RECIPE
    for override, expected in (
        ("export.canvas=[64,96]", ((64, 96), 64, 96)),
        ("export.canvas=[128,192]", ((128, 192), 96, 130)),
        ("export.short_edge_pixels=64", ((64, 160), 64, 130)),
    ):
        export = prepared(str(retinanet.config), retinanet.weights, [override], path)[0].sections["export"]
        assert (export.canvas, export.short_edge_pixels, export.max_edge_pixels) == expected


@pytest.fixture(scope="module")
def exported(retinanet: OwnModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder without a data set."""
    run_dir = tmp_path_factory.mktemp("runs") / "my.model"
    assert command_line(*retinanet.arguments(run_dir, "export.max_batch_size=2")) == 0
    return run_dir


def test_the_run_folder_says_what_was_done_here_and_what_was_not(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signature = json.loads((exported / "export" / "signature.json").read_text())
    assert signature["class_names"] == ["class_0", "class_1", "class_2"]
    assert all(gate["passed"] for gate in manifest(exported, "export")["gates"])
    for arguments in (("--runs", exported.parent), (exported,)):
        assert command_line("status", *arguments) == 0
        states = dict(re.findall(r"│ (\w+) +│ (not run|\w+)", capsys.readouterr().out))
        assert states["data"] == states["train"] == "not run"
        assert states["strip"] == states["export"] == "done"
        assert states["validate"] == "missing"


def test_the_checkpoint_loads_where_only_detectron2_is(exported: Path, retinanet: OwnModel) -> None:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    config = get_cfg()
    config.merge_from_file(str(exported / "strip" / "config.yaml"))
    detector = build_model(config)
    state = torch.load(exported / "strip" / "student.pth", weights_only=True)["model"]
    detector.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[key]) for key, value in retinanet.detector.state_dict().items())


def test_the_same_command_again_changes_nothing(
    exported: Path, retinanet: OwnModel, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = manifest(exported, "export")["finished"]
    assert command_line(*retinanet.arguments(exported, "export.max_batch_size=2")) == 0
    assert "export: up to date" in capsys.readouterr().out
    assert manifest(exported, "export")["finished"] == finished
    assert recipes.load(exported).sections["training"].checkpoint == retinanet.weights


def test_measuring_without_labels_says_what_to_give(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("validate", exported) == 2
    assert "dataset.validation=FILE" in capsys.readouterr().err


def test_overrides_of_a_folder_are_remembered(exported: Path, tmp_path: Path) -> None:
    recipe = recipes.load(exported, ["parity.num_batch_images=5"])
    assert (recipe.name, recipe.folder) == ("my.model", exported)
    assert recipe.command == f"python -m pipeline run {exported} parity.num_batch_images=5"
    before = (exported / FOLDER_RECIPE).read_bytes()
    recipes.save(recipe)
    again = recipes.load(exported)
    assert again.sections["parity"].num_batch_images == 5
    assert again.resolved["model"] == recipe.resolved["model"]
    (exported / FOLDER_RECIPE).write_bytes(before)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        (["disc", "bar"], r"has 2 categories and the detector 3 classes"),
        (["bar", "disc", "blob"], r"in another order: label 0 is 'bar' there and 'disc' by as given"),
    ],
)
def test_a_data_set_of_other_classes_is_refused(
    retinanet: OwnModel, categories: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    overrides = overrides_for("coco", tmp_path / "data")[1:]
    file = tmp_path / "data" / "instances.json"
    document = json.loads(file.read_text())
    document["categories"] = [{"id": i, "name": name} for i, name in enumerate(categories, start=1)]
    document["annotations"] = [a for a in document["annotations"] if a["category_id"] <= len(categories)]
    file.write_text(json.dumps(document))
    names = f"training.class_names=[{','.join(CLASS_NAMES)}]"
    assert command_line(*retinanet.arguments(tmp_path / "run", *overrides, names)) == 2
    assert re.search(message, capsys.readouterr().err)
