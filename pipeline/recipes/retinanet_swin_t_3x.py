"""RetinaNet with Swin-T on COCO: 37 epochs (3x) at several image sizes, with LGD.

    make train-export-deploy RECIPE=retinanet_swin_t_3x LAUNCH="torchrun --nproc-per-node=8"
    make train-export-deploy RECIPE=retinanet_swin_t_3x LAUNCH="torchrun --nproc-per-node=8" \\
        SET="distiller=none" NAME=retinanet_swin_t_3x_baseline

Box AP on val2017: baseline 44.6; LGD 46.0 in the paper and 45.9 with its released code.
Hardware: 16 GPUs of 11 GB (RTX 2080 Ti) in two machines, or 8 V100; with 8 of the former the reference ran out of
memory. Its training times are not published.
Weights: no model zoo of detectron2 has them. Put Microsoft's ``swin_tiny_patch4_window7_224.pth`` (release v1.0.0 of
github.com/microsoft/Swin-Transformer) into ``weights/``, or give ``training.init_checkpoint=FILE``.
Settings: the reference's configuration of this row.
Uncertain: the reference's file of this row names neither channel order nor pixel statistics; here they are those that
the weights were trained with (RGB, ImageNet's mean and deviation).
"""

from detectron2.config import LazyCall as L

from export.parity import ParityConfig
from pipeline.recipe_parts import (
    COCO_3X,
    IMAGENET_RGB,
    SWIN_TINY,
    coco,
    export_800,
    published_training,
    retinanet,
    swin_tiny,
)
from serving.config import BenchmarkConfig, ServingConfig
from training.distillers import LgdConfig

model = retinanet(
    swin_tiny(out_features=("p1", "p2", "p3")), bottom_up_features=("p1", "p2", "p3"), pixels=IMAGENET_RGB
)
dataset = coco()
training = published_training(
    COCO_3X, learning_rate=1e-4, optimizer="adamw", weight_decay=0.05, init_checkpoint=SWIN_TINY
)
distiller = L(LgdConfig)(
    context_object=True,
    detach_appearance=False,
    distill_from_iter=30_000,
    freeze_backbone_until_iter=20_000,
)
export = export_800()
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="coco_retinanet_swin_t_800_fp32")
benchmark = L(BenchmarkConfig)()
