"""The recipes hold the settings that were published, and say what results were.

The tables here were written from the references' configurations, the papers and the README of LGD's code, not from
the recipes. P, Q and F are LGD's iterations without distillation at the start and at the end, and with a frozen
backbone; ctx is its context box, det its detached appearance embedding.
"""

from __future__ import annotations

import ast
import math

import pytest

from pipeline.recipe import RECIPES_DIR, Recipe, available, load

# Results: baseline, LGD of the paper, LGD of the README; "-" is not published or not known.
COCO_ROWS = """
recipe                           detector   network   epochs sizes ctx det P     Q     F     rate baseline paper README
retinanet_r50_2x                 RetinaNet  R-50      2x     MS    Y   N   30000 0     20000 0.01 38.8     40.3  40.4
retinanet_r101_2x                RetinaNet  R-101     2x     MS    Y   N   30000 0     20000 0.01 40.6     42.1  42.1
retinanet_r101_dcn_2x            RetinaNet  R-101-DCN 2x     MS    Y   N   30000 0     20000 0.01 43.1     44.4  44.5
retinanet_x101_dcn_2x            RetinaNet  X-101-DCN 2x     MS    Y   N   30000 50000 20000 0.01 43.8     45.9  45.9
retinanet_swin_t_3x              RetinaNet  Swin-T    3x     MS    Y   N   30000 0     20000 1e-4 44.6     46.0  45.9
fcos_r50_2x                      PaperFCOS  R-50      2x     MS    N   N   30000 0     20000 0.01 -        -     42.4
fcos_r101_2x                     PaperFCOS  R-101     2x     MS    Y   N   30000 0     20000 0.01 -        -     44.0
fcos_r101_dcn_2x                 PaperFCOS  R-101-DCN 2x     MS    Y   N   30000 50000 20000 0.01 -        -     46.3
fcos_x101_dcn_2x                 PaperFCOS  X-101-DCN 2x     MS    Y   N   30000 50000 20000 0.01 46.1     47.9  47.9
faster_rcnn_r50_2x               FasterRCNN R-50      2x     MS    N   Y   30000 0     20000 0.02 -        -     40.5
faster_rcnn_r101_2x              FasterRCNN R-101     2x     MS    N   Y   30000 0     20000 0.02 -        -     42.2
faster_rcnn_r101_dcn_2x          FasterRCNN R-101-DCN 2x     MS    N   Y   30000 0     20000 0.02 -        -     44.8
faster_rcnn_x101_dcn_2x          FasterRCNN X-101-DCN 2x     MS    N   Y   30000 50000 20000 0.02 45.1     46.1  46.2
mask_rcnn_swin_t_3x              MaskRCNN   Swin-T    3x     MS    N   Y   30000 0     20000 1e-4 45.5     46.4  46.4
retinanet_r50_1x                 RetinaNet  R-50      1x     MS    Y   Y   20000 0     10000 0.01 37.4     38.5  -
retinanet_r50_1x_single_scale    RetinaNet  R-50      1x     SS    Y   Y   20000 0     10000 0.01 36.6     38.3  -
retinanet_r50_2x_single_scale    RetinaNet  R-50      2x     SS    Y   N   30000 0     70000 0.01 36.2     39.0  -
faster_rcnn_r50_1x               FasterRCNN R-50      1x     MS    N   Y   20000 0     10000 0.02 37.9     38.6  -
faster_rcnn_r50_1x_single_scale  FasterRCNN R-50      1x     SS    N   Y   20000 0     10000 0.02 37.6     38.3  -
atss_r50_1x_single_scale         ATSS       R-50      1x     SS    Y   N   30000 0     10000 0.01 39.3     40.0  -
atss_r101_dcn_2x                 ATSS       R-101-DCN 2x     MS    Y   N   30000 50000 20000 0.01 45.8     46.8  -
mask_rcnn_r50_1x                 MaskRCNN   R-50      1x     MS    N   Y   20000 0     10000 0.02 38.8     39.8  -
mask_rcnn_r101_1x                MaskRCNN   R-101     1x     MS    N   Y   20000 0     10000 0.02 41.2     42.0  -
detectron2_fcos_r50_1x           FCOS       R-50      1x     MS    Y   N   20000 0     10000 0.01 -        -     -
"""
OTHER_ROWS = """
recipe                     detector   format     rate  baseline paper
retinanet_r50_voc          RetinaNet  voc        0.01  56.6     58.9
faster_rcnn_r50_voc        FasterRCNN voc        0.02  55.1     56.8
retinanet_r50_crowdhuman   RetinaNet  crowdhuman 0.01  57.9     56.4
faster_rcnn_r50_crowdhuman FasterRCNN crowdhuman 0.02  48.7     46.4
"""
# GFL's plain students; the results are of the tables of localisation distillation.
GFL_ROWS = """
recipe                  depth result
gfl_r18_1x_single_scale 18    35.8
gfl_r34_1x_single_scale 34    38.9
gfl_r50_1x_single_scale 50    40.1
"""
UNPUBLISHED = ("embedded", "retinanet_r50_single_gpu")

EPOCHS = {
    "1x": (90_000, (60_000, 80_000)),
    "2x": (180_000, (120_000, 160_000)),
    "3x": (270_000, (210_000, 250_000)),
}
SIZES = {"MS": (640, 672, 704, 736, 768, 800), "SS": (800,)}
DETECTORS = {
    "RetinaNet": "detectron2.modeling.meta_arch.retinanet.RetinaNet",
    "PaperFCOS": "training.detectors.location_detector.LocationDetector",
    "FCOS": "training.detectors.stock_fcos.stock_fcos",
    "ATSS": "training.detectors.location_detector.LocationDetector",
    "FasterRCNN": "detectron2.modeling.meta_arch.rcnn.GeneralizedRCNN",
    "MaskRCNN": "detectron2.modeling.meta_arch.rcnn.GeneralizedRCNN",
}
ZOO = "detectron2://ImageNetPretrained"
MATCHERS = {
    "PaperFCOS": "training.detectors.fcos_matcher.FcosMatcher",
    "ATSS": "training.detectors.atss_matcher.AtssMatcher",
}
WEIGHTS = {
    "R-50": f"{ZOO}/MSRA/R-50.pkl",
    "R-101": f"{ZOO}/MSRA/R-101.pkl",
    "R-101-DCN": f"{ZOO}/MSRA/R-101.pkl",
    "X-101-DCN": f"{ZOO}/FAIR/X-101-32x8d.pkl",
    "Swin-T": "weights/swin_tiny_patch4_window7_224.pth",
}
PIXEL_STD = {"R": [1.0, 1.0, 1.0], "X": [57.375, 57.12, 58.395]}


def _rows(table: str) -> dict[str, dict[str, str]]:
    header, *lines = (line.split() for line in table.strip().splitlines())
    return {values[0]: dict(zip(header, values, strict=True)) for values in lines}


COCO, OTHER, GFL = _rows(COCO_ROWS), _rows(OTHER_ROWS), _rows(GFL_ROWS)
ROWS = {**COCO, **OTHER}


def _docstring(recipe: str) -> str:
    found = ast.get_docstring(ast.parse((RECIPES_DIR / f"{recipe}.py").read_text()))
    assert found is not None, "a recipe says what it is"
    return " ".join(found.split())


def test_every_recipe_is_in_a_table() -> None:
    assert sorted((*ROWS, *GFL, *UNPUBLISHED)) == available()


@pytest.mark.parametrize("name", COCO)
def test_a_recipe_of_coco_trains_as_published(name: str) -> None:
    row, recipe = COCO[name], load(name)
    training, schedule = recipe.sections["training"], recipe.sections["distiller"].schedule()
    max_iter, decay = EPOCHS[row["epochs"]]
    assert (training.max_iter, training.lr_decay_iters) == (max_iter, decay)
    assert training.short_edge_pixels == SIZES[row["sizes"]]
    assert training.max_edge_pixels == 1333
    adamw = row["network"] == "Swin-T"
    assert training.optimizer == ("adamw" if adamw else "sgd")
    assert training.learning_rate == float(row["rate"])
    assert training.weight_decay == (0.05 if adamw else 1e-4)
    assert training.init_checkpoint == WEIGHTS[row["network"]]

    P, Q, F = int(row["P"]), int(row["Q"]), int(row["F"])
    assert schedule.distill_from_iter == P
    assert schedule.freeze_backbone_until_iter == F
    # The reference distils while t <= MAX - Q; our end is the first iteration without.
    assert schedule.distill_until_iter == (max_iter - Q + 1 if Q else None)


@pytest.mark.parametrize("name", COCO)
def test_a_recipe_of_coco_distils_as_published(name: str) -> None:
    row, distiller = COCO[name], load(name).sections["distiller"]
    assert distiller.context_object is (row["ctx"] == "Y")
    assert distiller.detach_appearance is (row["det"] == "Y")
    assert distiller.use_masks is (row["detector"] == "MaskRCNN")
    assert (distiller.loss_weight, distiller.num_heads, distiller.query) == (1.0, 8, "appearance")
    assert distiller.grid_offset == 0.0


@pytest.mark.parametrize("name", ROWS)
def test_what_all_published_recipes_share(name: str) -> None:
    training = load(name).sections["training"]
    assert training.images_per_batch == 16
    assert training.accumulate_batches == 1
    assert training.clip_gradient_value == 1.0
    assert training.lr_schedule == "multistep"
    assert training.warmup_iters == (100 if name.endswith("voc") else 1000)
    assert training.skip_empty_images
    assert training.precision == "fp32"
    assert training.ema_decay is None
    own = training.teacher_optimizer
    if name == "mask_rcnn_swin_t_3x":
        assert (own.optimizer, own.learning_rate, own.weight_decay) == ("sgd", 0.02, 1e-4)
    else:
        assert own is None


@pytest.mark.parametrize("name", COCO)
def test_a_recipe_of_coco_builds_the_network_of_its_row(name: str) -> None:
    row, recipe = COCO[name], load(name)
    model, network = recipe.resolved["model"], row["network"]
    assert model["_target_"] == DETECTORS[row["detector"]]
    assert model.get("matcher", {}).get("_target_") == MATCHERS.get(row["detector"])
    if "roi_heads" in model:
        assert ("mask_head" in model["roi_heads"]) is (row["detector"] == "MaskRCNN")
    bottom_up, top_block = model["backbone"]["bottom_up"], model["backbone"]["top_block"]
    assert model["backbone"]["out_channels"] == 256
    if row["detector"] in ("RetinaNet", "PaperFCOS", "ATSS") and network != "Swin-T":
        # The reference's FCOS configurations are based on RetinaNet's, pyramid included.
        assert (top_block["in_feature"], top_block["in_channels"]) == ("res5", 2048)
    elif row["detector"] not in ("FasterRCNN", "MaskRCNN"):
        assert (top_block["in_feature"], top_block["in_channels"]) == ("p5", 256)
    if network == "Swin-T":
        assert (bottom_up["depths"], bottom_up["window_size"]) == ([2, 2, 6, 2], 7)
        assert (bottom_up["drop_path_rate"], bottom_up["frozen_stages"]) == (0.2, -1)
        assert model["input_format"] == "RGB"
        return
    assert (model["input_format"], model["pixel_std"]) == ("BGR", PIXEL_STD[network[0]])
    assert bottom_up["freeze_at"] == 2
    stages = bottom_up["stages"]
    assert [stage["num_blocks"] for stage in stages] == [3, 4, 6 if network == "R-50" else 23, 3]
    assert ["Deformable" in stage["block_class"] for stage in stages] == [False] + 3 * [network.endswith("DCN")]
    assert {stage["num_groups"] for stage in stages} == {32 if network[0] == "X" else 1}
    assert {stage["stride_in_1x1"] for stage in stages} == {network[0] == "R"}
    assert {stage["norm"] for stage in stages} == {"FrozenBN"}


@pytest.mark.parametrize("name", OTHER)
def test_recipes_of_other_data_sets_scale_the_schedule_of_coco(name: str) -> None:
    row, recipe = OTHER[name], load(name)
    training, distiller = recipe.sections["training"], recipe.sections["distiller"]
    assert recipe.sections["dataset"].format == row["format"]
    assert training.learning_rate == float(row["rate"])
    assert recipe.resolved["model"]["_target_"] == DETECTORS[row["detector"]]
    first_decay, second_decay = (iteration / training.max_iter for iteration in training.lr_decay_iters)
    assert 0.66 < first_decay <= 0.8
    assert 0.88 < second_decay <= 0.9
    assert 0.2 < distiller.distill_from_iter / training.max_iter < 0.34
    assert math.isclose(distiller.freeze_backbone_until_iter / training.max_iter, 0.11, abs_tol=0.005)
    assert distiller.context_object is (row["detector"] == "RetinaNet")


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_says_its_commands_and_the_results_of_its_row(name: str) -> None:
    row, words = ROWS[name], _docstring(name)
    assert f"make train-export-deploy RECIPE={name} " in words
    assert f'SET="distiller=none" NAME={name}_baseline' in words
    assert "Hardware:" in words
    assert "baseline" in words
    assert "LGD" in words
    for column in ("baseline", "paper", "README"):
        published = row.get(column, "-")
        if published != "-":
            assert published in words, f"the {column} result"
    if row["baseline"] == "-":
        assert "Uncertain:" in words


@pytest.mark.parametrize("name", ROWS)
def test_the_baseline_of_a_recipe_differs_in_its_distiller_alone(name: str) -> None:
    recipe, baseline = load(name), load(name, ["distiller=none"])
    assert type(baseline.sections["distiller"]).__name__ == "NoDistillerConfig"
    assert _without_distiller(recipe) == _without_distiller(baseline)


@pytest.mark.parametrize("name", GFL)
def test_a_recipe_of_gfl_trains_twelve_epochs_without_a_distiller_as_published(name: str) -> None:
    recipe = load(name)
    training = recipe.sections["training"]
    assert type(recipe.sections["distiller"]).__name__ == "NoDistillerConfig"
    epoch = math.ceil(117_266 / 16)  # of train2017's images that have objects
    assert training.skip_empty_images
    assert (training.images_per_batch, training.max_iter) == (16, 12 * epoch)
    assert training.lr_decay_iters == (8 * epoch, 11 * epoch)
    assert (training.optimizer, training.learning_rate, training.weight_decay) == ("sgd", 0.01, 1e-4)
    assert (training.warmup_iters, training.clip_gradient_value) == (500, None)
    assert (training.short_edge_pixels, training.max_edge_pixels) == ((800,), 1333)
    assert (recipe.sections["export"].short_edge_pixels, recipe.sections["export"].canvas) == (800, (800, 1344))


@pytest.mark.parametrize("name", GFL)
def test_a_recipe_of_gfl_builds_the_network_of_its_row_and_says_its_result(name: str) -> None:
    depth, recipe = int(GFL[name]["depth"]), load(name)
    model = recipe.resolved["model"]
    assert model["_target_"] == "training.detectors.gfl_detector.GflDetector"
    assert model["matcher"]["_target_"] == MATCHERS["ATSS"]
    assert model["head"]["reg_max"] == 16
    bottom_up, top_block = model["backbone"]["bottom_up"], model["backbone"]["top_block"]
    assert (top_block["in_feature"], top_block["in_channels"]) == ("p5", 256)
    assert (model["input_format"], model["pixel_std"]) == ("RGB", [58.395, 57.12, 57.375])
    if depth == 50:
        assert {stage["stride_in_1x1"] for stage in bottom_up["stages"]} == {False}
    else:
        assert bottom_up["stages"]["depth"] == depth
    weights = {18: "weights/resnet18-f37072fd.pth", 34: "weights/resnet34-b627a593.pth"}
    assert recipe.sections["training"].init_checkpoint == weights.get(depth, f"{ZOO}/torchvision/R-50.pkl")
    words = _docstring(name)
    assert f"make train-export-deploy RECIPE={name} " in words
    assert f"Box AP on val2017: {GFL[name]['result']}," in words
    assert f"ResNet-{depth} " in words


def _without_distiller(recipe: Recipe) -> dict:
    return {name: section for name, section in recipe.resolved.items() if name != "distiller"}


def test_coco_leaves_out_the_two_boxes_without_height() -> None:
    for name in COCO:
        dataset = load(name).sections["dataset"]
        assert dataset.drop_degenerate_boxes
        assert dataset.train == "datasets/coco/annotations/instances_train2017.json"
        assert dataset.validation == "datasets/coco/annotations/instances_val2017.json"


def test_published_results_are_measured_at_short_edge_800() -> None:
    for name in ROWS:
        export, training = load(name).sections["export"], load(name).sections["training"]
        assert (export.short_edge_pixels, export.max_edge_pixels) == (800, training.max_edge_pixels)
        assert export.canvas == (800, 1408 if OTHER.get(name, {}).get("format") == "crowdhuman" else 1344)


def test_the_recipe_of_a_single_gpu_keeps_the_ratios_of_the_1x_schedule() -> None:
    recipe = load("retinanet_r50_single_gpu", ["dataset.train=a.json", "dataset.validation=b.json"])
    training, distiller = recipe.sections["training"], recipe.sections["distiller"]
    assert (training.precision, training.images_per_batch) == ("bf16", 32)
    ratios = [value / training.max_iter for value in (*training.lr_decay_iters, distiller.distill_from_iter)]
    assert ratios == pytest.approx([60 / 90, 80 / 90, 20 / 90], abs=0.005)
    assert distiller.freeze_backbone_until_iter / training.max_iter == pytest.approx(10 / 90, abs=0.005)
    assert training.learning_rate / training.images_per_batch == pytest.approx(0.01 / 16)
    assert {stage["stride_in_1x1"] for stage in recipe.resolved["model"]["backbone"]["bottom_up"]["stages"]} == {False}
    words = _docstring("retinanet_r50_single_gpu")
    assert "distiller=none" in words
    assert "dataset.train=" in words
