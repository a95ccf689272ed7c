"""A recipe's detector with fewer channels on a ResNet-18: the same classes, small enough for the everyday tests."""

from __future__ import annotations

from typing import Any

from detectron2.layers import ShapeSpec

from pipeline.recipe import Recipe
from pipeline.recipe_parts import resnet

CHANNELS = 64  # two for each of a group normalisation's 32 groups, or a map of one cell would be nothing
RES5_CHANNELS = 512


def shrink(recipe: Recipe) -> None:
    """Change the recipe's model in place."""
    model = recipe.model
    pyramid = model.backbone
    pyramid.in_features = ["res2", "res3", "res4", "res5"][-len(pyramid.in_features) :]
    pyramid.bottom_up = resnet(18, out_features=tuple(pyramid.in_features))
    pyramid.out_channels = CHANNELS
    if "in_channels" in pyramid.top_block:
        pyramid.top_block.in_channels = RES5_CHANNELS if pyramid.top_block.in_feature == "res5" else CHANNELS
        pyramid.top_block.out_channels = CHANNELS
    (_shrink_two_stage if "roi_heads" in model else _shrink_dense)(model)


def _shrink_dense(model: Any) -> None:
    head = model.head
    if "conv_dims" in head:
        head.conv_dims = [CHANNELS]
        head.input_shape = [ShapeSpec(channels=CHANNELS)] * len(model.head_in_features)
    else:
        head.channels, head.num_convs = CHANNELS, 1


def _shrink_two_stage(model: Any) -> None:
    heads = model.roi_heads
    model.proposal_generator.head.in_channels = CHANNELS
    heads.box_head.input_shape = ShapeSpec(channels=CHANNELS, height=7, width=7)
    heads.box_head.fc_dims = [2 * CHANNELS]
    heads.box_predictor.input_shape = ShapeSpec(channels=2 * CHANNELS)
    if "mask_head" in heads:
        heads.mask_head.input_shape = ShapeSpec(channels=CHANNELS, height=14, width=14)
        heads.mask_head.conv_dims = [CHANNELS, CHANNELS]
