"""RetinaNet with ResNet-50 on Pascal VOC 2007 and 2012, with LGD.

    make train-export-deploy RECIPE=retinanet_r50_voc LAUNCH="torchrun --nproc-per-node=8"
    make train-export-deploy RECIPE=retinanet_r50_voc LAUNCH="torchrun --nproc-per-node=8" \\
        SET="distiller=none" NAME=retinanet_r50_voc_baseline

AP / AP50 / AP75 on the test set of 2007: baseline 56.6 / 81.4 / 61.3; LGD 58.9 / 82.6 / 64.3 in the paper.
Hardware: 8 GPUs of 11 GB (RTX 2080 Ti) in the paper, two images each; the time is not published.
Uncertain: no configuration of this row was published. The schedule is detectron2's for Faster R-CNN on Pascal VOC,
the distiller's settings are those of COCO's 1x schedule, scaled.
"""

from detectron2.config import LazyCall as L

from export.parity import ParityConfig
from pipeline.recipe_parts import (
    CAFFE_BGR,
    MSRA_R50,
    VOC_SCALES,
    VOC_SCHEDULE,
    export_800,
    published_training,
    resnet,
    retinanet,
    voc,
)
from serving.config import BenchmarkConfig, ServingConfig
from training.distillers import LgdConfig

model = retinanet(resnet(50), top_block_in="res5", pixels=CAFFE_BGR)
dataset = voc()
training = published_training(VOC_SCHEDULE, learning_rate=0.01, short_edge_pixels=VOC_SCALES, init_checkpoint=MSRA_R50)
distiller = L(LgdConfig)(
    context_object=True,
    detach_appearance=True,
    distill_from_iter=4_000,
    freeze_backbone_until_iter=2_000,
)
export = export_800()
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="voc_retinanet_r50_800_fp32")
benchmark = L(BenchmarkConfig)()
