"""RetinaNet with ResNet-50 on COCO: 12 epochs (1x) at one image size, with LGD.

    make train-export-deploy RECIPE=retinanet_r50_1x_single_scale LAUNCH="torchrun --nproc-per-node=8"
    make train-export-deploy RECIPE=retinanet_r50_1x_single_scale LAUNCH="torchrun --nproc-per-node=8" \\
        SET="distiller=none" NAME=retinanet_r50_1x_single_scale_baseline

Box AP on val2017: baseline 36.6; LGD 38.3 in the paper.
Hardware: 8 GPUs of 11 GB (RTX 2080 Ti) in the paper, two images each; the time is not published.
Uncertain: an older version of the reference has two configurations of this row and does not say which gave 38.3: this
one, and one with ``distiller.distill_from_iter=30000``.
"""

from detectron2.config import LazyCall as L

from export.parity import ParityConfig
from pipeline.recipe_parts import (
    CAFFE_BGR,
    COCO_1X,
    MSRA_R50,
    SINGLE_SCALE,
    coco,
    export_800,
    published_training,
    resnet,
    retinanet,
)
from serving.config import BenchmarkConfig, ServingConfig
from training.distillers import LgdConfig

model = retinanet(resnet(50), top_block_in="res5", pixels=CAFFE_BGR)
dataset = coco()
training = published_training(COCO_1X, learning_rate=0.01, short_edge_pixels=SINGLE_SCALE, init_checkpoint=MSRA_R50)
distiller = L(LgdConfig)(
    context_object=True,
    detach_appearance=True,
    distill_from_iter=20_000,
    freeze_backbone_until_iter=10_000,
)
export = export_800()
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="coco_retinanet_r50_800_fp32")
benchmark = L(BenchmarkConfig)()
