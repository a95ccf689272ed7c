"""ATSS with ResNet-101-DCN on COCO: 24 epochs (2x) at several image sizes, with LGD.

    make train-export-deploy RECIPE=atss_r101_dcn_2x LAUNCH="torchrun --nproc-per-node=8"
    make train-export-deploy RECIPE=atss_r101_dcn_2x LAUNCH="torchrun --nproc-per-node=8" \\
        SET="distiller=none" NAME=atss_r101_dcn_2x_baseline

Box AP on val2017: baseline 45.8; LGD 46.8 in the paper.
Hardware: 8 GPUs of 11 GB (RTX 2080 Ti) in the paper, two images each; the time is not published.
Uncertain: no configuration of ATSS was published. The distiller's settings are those of FCOS with the same network.
"""

from detectron2.config import LazyCall as L

from export.parity import ParityConfig
from pipeline.recipe_parts import CAFFE_BGR, COCO_2X, MSRA_R101, atss, coco, export_800, published_training, resnet
from serving.config import BenchmarkConfig, ServingConfig
from training.distillers import LgdConfig

model = atss(resnet(101, deformable=True), top_block_in="res5", pixels=CAFFE_BGR)
dataset = coco()
training = published_training(COCO_2X, learning_rate=0.01, init_checkpoint=MSRA_R101)
distiller = L(LgdConfig)(
    context_object=True,
    detach_appearance=False,
    distill_from_iter=30_000,
    distill_until_iter=130_001,
    freeze_backbone_until_iter=20_000,
)
export = export_800()
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="coco_atss_r101_dcn_800_fp32")
benchmark = L(BenchmarkConfig)()
