"""RetinaNet with ResNet-50 on COCO: 24 epochs (2x) at several image sizes, with LGD.

    make train-export-deploy RECIPE=retinanet_r50_2x LAUNCH="torchrun --nproc-per-node=8"
    make train-export-deploy RECIPE=retinanet_r50_2x LAUNCH="torchrun --nproc-per-node=8" \\
        SET="distiller=none" NAME=retinanet_r50_2x_baseline

Box AP on val2017: baseline 38.8; LGD 40.3 in the paper and 40.4 with its released code.
Hardware: 8 GPUs of 11 GB (RTX 2080 Ti) in the paper, two images each: 12.1 hours for the baseline and 23.5 with LGD
(Table 7, which does not name its detector; presumably this one).
Settings: the reference's configuration of this row.
The 3x schedule is published too, baseline 38.7 and LGD 40.5: ``SET="training.max_iter=270000
training.lr_decay_iters=[210000,250000]"``.
"""

from detectron2.config import LazyCall as L

from export.parity import ParityConfig
from pipeline.recipe_parts import CAFFE_BGR, COCO_2X, MSRA_R50, coco, export_800, published_training, resnet, retinanet
from serving.config import BenchmarkConfig, ServingConfig
from training.distillers import LgdConfig

model = retinanet(resnet(50), top_block_in="res5", pixels=CAFFE_BGR)
dataset = coco()
training = published_training(COCO_2X, learning_rate=0.01, init_checkpoint=MSRA_R50)
distiller = L(LgdConfig)(
    context_object=True,
    detach_appearance=False,
    distill_from_iter=30_000,
    freeze_backbone_until_iter=20_000,
)
export = export_800()
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="coco_retinanet_r50_800_fp32")
benchmark = L(BenchmarkConfig)()
