"""FCOS with ResNet-101-DCN on COCO: 24 epochs (2x) at several image sizes, with LGD.

    make train-export-deploy RECIPE=fcos_r101_dcn_2x LAUNCH="torchrun --nproc-per-node=8"
    make train-export-deploy RECIPE=fcos_r101_dcn_2x LAUNCH="torchrun --nproc-per-node=8" \\
        SET="distiller=none" NAME=fcos_r101_dcn_2x_baseline

Box AP on val2017: baseline unknown (see below); LGD 46.3 with its released code.
Hardware: 8 GPUs of 11 GB (RTX 2080 Ti) in the paper, two images each; the time is not published.
Settings: the reference's configuration of this row. Distillation ends with iteration 130,000, which the paper
explains with overfitting.
The head is the paper's (a learnt scale for each level, box loss weighted by centerness), not detectron2's own FCOS,
whose baseline differs; ``detectron2_fcos_r50_1x`` trains that one.
Uncertain: the baseline of this row is in the paper's Table 1 and was not at hand when this was written; train it.
"""

from detectron2.config import LazyCall as L

from export.parity import ParityConfig
from pipeline.recipe_parts import (
    CAFFE_BGR,
    COCO_2X,
    MSRA_R101,
    coco,
    export_800,
    paper_fcos,
    published_training,
    resnet,
)
from serving.config import BenchmarkConfig, ServingConfig
from training.distillers import LgdConfig

model = paper_fcos(resnet(101, deformable=True), top_block_in="res5", pixels=CAFFE_BGR)
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
serving = L(ServingConfig)(model_name="coco_paper_fcos_r101_dcn_800_fp32")
benchmark = L(BenchmarkConfig)()
