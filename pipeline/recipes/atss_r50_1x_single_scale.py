"""ATSS with ResNet-50 on COCO: 12 epochs (1x) at one image size, with LGD.

    make train-export-deploy RECIPE=atss_r50_1x_single_scale LAUNCH="torchrun --nproc-per-node=8"
    make train-export-deploy RECIPE=atss_r50_1x_single_scale LAUNCH="torchrun --nproc-per-node=8" \\
        SET="distiller=none" NAME=atss_r50_1x_single_scale_baseline

Box AP on val2017: baseline 39.3; LGD 40.0 in the paper. A third party got 39.4 and 39.9 (issue 2 of the reference's
repository).
Hardware: 8 GPUs of 11 GB (RTX 2080 Ti) in the paper, two images each; the time is not published.
Uncertain: no configuration of this row was published. The iterations are the third party's, the rest is FCOS's of the
2x schedule.
"""

from detectron2.config import LazyCall as L

from export.parity import ParityConfig
from pipeline.recipe_parts import (
    CAFFE_BGR,
    COCO_1X,
    MSRA_R50,
    SINGLE_SCALE,
    atss,
    coco,
    export_800,
    published_training,
    resnet,
)
from serving.config import BenchmarkConfig, ServingConfig
from training.distillers import LgdConfig

model = atss(resnet(50), top_block_in="res5", pixels=CAFFE_BGR)
dataset = coco()
training = published_training(COCO_1X, learning_rate=0.01, short_edge_pixels=SINGLE_SCALE, init_checkpoint=MSRA_R50)
distiller = L(LgdConfig)(
    context_object=True,
    detach_appearance=False,
    distill_from_iter=30_000,
    freeze_backbone_until_iter=10_000,
)
export = export_800()
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="coco_atss_r50_800_fp32")
benchmark = L(BenchmarkConfig)()
