"""Mask R-CNN with ResNet-101 on COCO: 12 epochs (1x) at several image sizes, with LGD that knows the objects' masks.

    make train-export-deploy RECIPE=mask_rcnn_r101_1x LAUNCH="torchrun --nproc-per-node=8"
    make train-export-deploy RECIPE=mask_rcnn_r101_1x LAUNCH="torchrun --nproc-per-node=8" \\
        SET="distiller=none" NAME=mask_rcnn_r101_1x_baseline

AP of boxes / masks on val2017: baseline 41.2 / 37.2; LGD 42.0 / 38.0 in the paper.
Hardware: 8 GPUs of 11 GB (RTX 2080 Ti) in the paper, two images each; the time is not published.
Uncertain: the paper does not give the schedule, and no configuration was published. The baseline fits detectron2's 1x
schedule; the distiller's settings are those of Mask R-CNN with Swin-T, scaled to it.
"""

from detectron2.config import LazyCall as L

from export.parity import ParityConfig
from pipeline.recipe_parts import CAFFE_BGR, COCO_1X, MSRA_R101, coco, export_800, mask_rcnn, published_training, resnet
from serving.config import BenchmarkConfig, ServingConfig
from training.distillers import LgdConfig

model = mask_rcnn(resnet(101, out_features=("res2", "res3", "res4", "res5")), pixels=CAFFE_BGR)
dataset = coco()
training = published_training(COCO_1X, learning_rate=0.02, init_checkpoint=MSRA_R101)
distiller = L(LgdConfig)(
    use_masks=True,
    context_object=False,
    detach_appearance=True,
    distill_from_iter=20_000,
    freeze_backbone_until_iter=10_000,
)
export = export_800()
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="coco_mask_rcnn_r101_800_fp32")
benchmark = L(BenchmarkConfig)()
