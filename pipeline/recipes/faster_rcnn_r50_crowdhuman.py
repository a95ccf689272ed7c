"""Faster R-CNN with ResNet-50 on CrowdHuman, with LGD.

    make train-export-deploy RECIPE=faster_rcnn_r50_crowdhuman LAUNCH="torchrun --nproc-per-node=8"
    make train-export-deploy RECIPE=faster_rcnn_r50_crowdhuman LAUNCH="torchrun --nproc-per-node=8" \\
        SET="distiller=none" NAME=faster_rcnn_r50_crowdhuman_baseline

MR⁻² on the validation set, where less is better: baseline 48.7; LGD 46.4 in the paper.
Hardware: 8 GPUs of 11 GB (RTX 2080 Ti) in the paper, two images each; the time is not published.
Uncertain: no configuration of this row was published. Schedule and image sizes are those usual for CrowdHuman, the
distiller's settings are those of COCO's 1x schedule, scaled.
"""

from detectron2.config import LazyCall as L

from export.parity import ParityConfig
from pipeline.recipe_parts import (
    CAFFE_BGR,
    CROWDHUMAN_SCHEDULE,
    MSRA_R50,
    SINGLE_SCALE,
    crowdhuman,
    export_800,
    faster_rcnn,
    published_training,
    resnet,
)
from serving.config import BenchmarkConfig, ServingConfig
from training.distillers import LgdConfig

model = faster_rcnn(resnet(50, out_features=("res2", "res3", "res4", "res5")), pixels=CAFFE_BGR)
model.roi_heads.box_predictor.test_topk_per_image = 300  # images hold up to some hundred people
dataset = crowdhuman()
training = published_training(
    CROWDHUMAN_SCHEDULE,
    learning_rate=0.02,
    short_edge_pixels=SINGLE_SCALE,
    max_edge_pixels=1400,
    init_checkpoint=MSRA_R50,
)
distiller = L(LgdConfig)(
    context_object=False,
    detach_appearance=True,
    distill_from_iter=6_000,
    freeze_backbone_until_iter=3_000,
)
export = export_800(max_edge_pixels=1400)
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="crowdhuman_faster_rcnn_r50_800_fp32")
benchmark = L(BenchmarkConfig)()
