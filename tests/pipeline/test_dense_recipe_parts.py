from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from pipeline.recipe import load
from pipeline.recipe_parts import CAFFE_BGR, atss, fcos, gfl, paper_fcos, resnet, retinanet, swin_tiny
from training.detectors.atss_matcher import AtssMatcher
from training.detectors.distribution_retinanet import DistributionRetinaNet
from training.detectors.edges import EdgeDistributions
from training.detectors.fcos_matcher import FcosMatcher
from training.detectors.gfl_detector import GflDetector
from training.detectors.location_detector import LocationDetector
from training.student import build_student

SMALL = {"channels": 64, "num_head_convs": 1, "pixels": CAFFE_BGR}


def built(model: Any) -> Any:
    return build_student(model, 3, seed=0)


def losses_of(detector: Any) -> dict[str, float]:
    instances = Instances((96, 128))
    instances.gt_boxes, instances.gt_classes = Boxes(torch.tensor([[20.0, 20, 80, 70]])), torch.tensor([2])
    with EventStorage(), torch.no_grad():
        losses = detector.train()([{"image": torch.zeros(3, 96, 128, dtype=torch.uint8), "instances": instances}])
    return {name: float(loss) for name, loss in losses.items()}


@pytest.mark.parametrize(
    ("model", "kind", "threshold", "nms_threshold"),
    [
        (retinanet(resnet(18), **SMALL), RetinaNet, 0.05, 0.5),
        (fcos(resnet(18), **SMALL), FCOS, 0.2, 0.6),
        (paper_fcos(resnet(18), **SMALL), LocationDetector, 0.05, 0.6),
        (atss(resnet(18), **SMALL), LocationDetector, 0.05, 0.6),
        (gfl(resnet(18), **SMALL), GflDetector, 0.05, 0.6),
        (retinanet(resnet(18), reg_max=16, **SMALL), DistributionRetinaNet, 0.05, 0.6),
        (paper_fcos(resnet(18), reg_max=16, **SMALL), LocationDetector, 0.05, 0.6),
        (atss(resnet(18), reg_max=16, **SMALL), LocationDetector, 0.05, 0.6),
    ],
    ids=["retinanet", "fcos", "paper_fcos", "atss", "gfl", "gfl_retinanet", "gfl_fcos", "gfl_atss"],
)
def test_each_part_builds_the_detector_for_the_data_sets_classes(
    model: Any, kind: type, threshold: float, nms_threshold: float
) -> None:
    detector = built(model)
    assert type(detector) is kind
    assert (detector.num_classes, detector.head.cls_score.out_channels % 3) == (3, 0)
    assert (detector.test_score_thresh, detector.test_nms_thresh) == (threshold, nms_threshold)
    assert detector.input_format == "BGR"
    assert detector.pixel_mean.flatten().tolist() == pytest.approx(CAFFE_BGR.mean)
    assert detector.backbone.top_block.in_feature == "p5"
    assert all(torch.isfinite(torch.tensor(value)) for value in losses_of(detector).values())


@pytest.mark.parametrize(("part", "weight"), [(retinanet, 2.0), (paper_fcos, 1.0), (atss, 2.0), (gfl, 2.0)])
def test_with_reg_max_the_head_predicts_distributions_and_the_box_loss_has_the_papers_weight(
    part: Any, weight: float
) -> None:
    detector = built(part(resnet(18), reg_max=7, **SMALL))
    assert isinstance(detector.head.edges, EdgeDistributions)
    assert detector.head.edges.reg_max == 7
    assert detector.head.bbox_pred.out_channels == (9 if part is retinanet else 1) * 4 * 8
    assert detector.box_loss_weight == weight


@pytest.mark.parametrize("part", [retinanet, paper_fcos, atss])
def test_a_detector_with_distributions_differs_from_the_plain_one_in_its_boxes_alone(part: Any) -> None:
    plain, distributional = part(resnet(18), **SMALL), part(resnet(18), reg_max=16, **SMALL)
    assert plain.head.pop("reg_max", None) is None
    assert distributional.head.pop("reg_max") == 16
    if part is retinanet:
        del plain.box2box_transform, plain.vis_period, distributional.box_loss_weight
        for tree in (plain, distributional):
            del tree._target_, tree.head._target_, tree.test_nms_thresh
    assert plain == distributional


@pytest.mark.parametrize("part", [retinanet, paper_fcos, atss, gfl])
def test_the_top_levels_are_taken_from_res5_where_asked(part: Any) -> None:
    detector = built(part(resnet(18), top_block_in="res5", res5_channels=512, **SMALL))
    assert detector.backbone.top_block.p6.in_channels == 512
    assert losses_of(detector).keys() >= {"loss_cls", "loss_box_reg"}


def test_res5_is_that_of_a_resnet_of_bottlenecks_unless_said_otherwise() -> None:
    default = retinanet(resnet(50), top_block_in="res5")
    assert default.backbone.top_block.in_channels == 2048
    with pytest.raises(ValueError, match="top_block_in is 'res4', expected 'p5' or 'res5'"):
        retinanet(resnet(18), top_block_in="res4")


def test_a_network_with_other_names_below_the_pyramid_serves_too() -> None:
    detector = built(retinanet(swin_tiny(), bottom_up_features=("p1", "p2", "p3"), **SMALL))
    assert sorted(detector.backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    assert losses_of(detector)["loss_cls"] > 0


def test_the_sizes_of_the_levels_and_the_groups_of_the_norm_reach_the_detector() -> None:
    detector = built(paper_fcos(resnet(18), level_size_bounds=(16, 32, 64, 128), norm_groups=16, **SMALL))
    assert detector.matcher.level_size_bounds == (16, 32, 64, 128)
    assert detector.head.cls_subnet[1].num_groups == 16


def test_the_two_detectors_of_locations_differ_in_their_matcher_and_the_weight_of_the_box_loss_only() -> None:
    trees = [part(resnet(18), **SMALL) for part in (paper_fcos, atss)]
    first, second = (built(tree) for tree in trees)
    assert (type(first.matcher), type(second.matcher)) == (FcosMatcher, AtssMatcher)
    assert (first.box_loss_weight, second.box_loss_weight) == (1.0, 2.0)
    for tree in trees:
        del tree.matcher, tree.box_loss_weight
    assert trees[0] == trees[1]


def test_a_recipes_matcher_takes_overrides() -> None:
    fcos_overrides = ["model.matcher.level_size_bounds=[16,32,64,128]", "model.matcher.center_sampling_radius=2"]
    matcher = instantiate(load("fcos_r50_2x", fcos_overrides).model.matcher)
    assert vars(matcher) == {"center_sampling_radius": 2, "level_size_bounds": (16, 32, 64, 128)}
    atss_overrides = ["model.matcher.anchor_scale=4", "model.matcher.num_level_candidates=5"]
    matcher = instantiate(load("atss_r50_1x_single_scale", atss_overrides).model.matcher)
    assert vars(matcher) == {"anchor_scale": 4, "num_level_candidates": 5}


def test_a_recipes_head_takes_distributions_as_an_override() -> None:
    model = load("atss_r50_1x_single_scale", ["model.head.reg_max=8"]).model
    assert instantiate(model.head).bbox_pred.out_channels == 4 * 9
    model = load("gfl_r18_1x_single_scale", ["model.head.reg_max=8"]).model
    assert instantiate(model.head).edges.reg_max == 8


def test_bounds_for_another_number_of_levels_are_refused_as_the_model_is_built() -> None:
    with pytest.raises(ValueError, match="level_size_bounds has 2 values for 5 levels; give one less than levels"):
        built(paper_fcos(resnet(18), level_size_bounds=(16, 32), **SMALL))
