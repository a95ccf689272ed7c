"""detectron2's own FCOS with ResNet-50 on COCO: 12 epochs (1x) at several image sizes, with LGD.

    make train-export-deploy RECIPE=detectron2_fcos_r50_1x LAUNCH="torchrun --nproc-per-node=8"
    make train-export-deploy RECIPE=detectron2_fcos_r50_1x LAUNCH="torchrun --nproc-per-node=8" \\
        SET="distiller=none" NAME=detectron2_fcos_r50_1x_baseline

Box AP on val2017: neither a baseline nor LGD is published for it; compare the two with each other.
Hardware: 8 GPUs of 11 GB, two images each, as for the rows of the paper.
Settings: detectron2's ``COCO-Detection/fcos_R_50_FPN_1x.py``, with the paper's clipping and weight decay. Uncertain:
the distiller's are FCOS's of the 2x schedule, scaled.
"""

from detectron2.config import LazyCall as L

from export.parity import ParityConfig
from pipeline.recipe_parts import CAFFE_BGR, COCO_1X, MSRA_R50, coco, export_800, fcos, published_training, resnet
from serving.config import BenchmarkConfig, ServingConfig
from training.distillers import LgdConfig

model = fcos(resnet(50), pixels=CAFFE_BGR)
dataset = coco()
training = published_training(COCO_1X, learning_rate=0.01, init_checkpoint=MSRA_R50)
distiller = L(LgdConfig)(
    context_object=True,
    detach_appearance=False,
    distill_from_iter=20_000,
    freeze_backbone_until_iter=10_000,
)
export = export_800()
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="coco_fcos_r50_800_fp32")
benchmark = L(BenchmarkConfig)()
