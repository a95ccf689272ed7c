"""Faster R-CNN with ResNet-50 on COCO: 12 epochs (1x) at several image sizes, with LGD.

    make train-export-deploy RECIPE=faster_rcnn_r50_1x LAUNCH="torchrun --nproc-per-node=8"
    make train-export-deploy RECIPE=faster_rcnn_r50_1x LAUNCH="torchrun --nproc-per-node=8" \\
        SET="distiller=none" NAME=faster_rcnn_r50_1x_baseline

Box AP on val2017: baseline 37.9; LGD 38.6 in the paper.
Hardware: 8 GPUs of 11 GB (RTX 2080 Ti) in the paper, two images each; the time is not published.
Uncertain: no configuration of this row was published. The distiller's settings are Faster R-CNN's of the 2x schedule
with RetinaNet's iterations of the 1x schedule.
"""

from detectron2.config import LazyCall as L

from export.parity import ParityConfig
from pipeline.recipe_parts import (
    CAFFE_BGR,
    COCO_1X,
    MSRA_R50,
    coco,
    export_800,
    faster_rcnn,
    published_training,
    resnet,
)
from serving.config import BenchmarkConfig, ServingConfig
from training.distillers import LgdConfig

model = faster_rcnn(resnet(50, out_features=("res2", "res3", "res4", "res5")), pixels=CAFFE_BGR)
dataset = coco()
training = published_training(COCO_1X, learning_rate=0.02, init_checkpoint=MSRA_R50)
distiller = L(LgdConfig)(
    context_object=False,
    detach_appearance=True,
    distill_from_iter=20_000,
    freeze_backbone_until_iter=10_000,
)
export = export_800()
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="coco_faster_rcnn_r50_800_fp32")
benchmark = L(BenchmarkConfig)()
