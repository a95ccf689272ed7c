"""Mask R-CNN with Swin-T on COCO: 37 epochs (3x) at several image sizes, with LGD that knows the objects' masks.

    make train-export-deploy RECIPE=mask_rcnn_swin_t_3x LAUNCH="torchrun --nproc-per-node=8"
    make train-export-deploy RECIPE=mask_rcnn_swin_t_3x LAUNCH="torchrun --nproc-per-node=8" \\
        SET="distiller=none" NAME=mask_rcnn_swin_t_3x_baseline

AP of boxes / masks on val2017: baseline 45.5 / 41.8; LGD 46.4 / 42.4 in the paper and 46.4 / 42.5 with its released
code.
Hardware: 16 GPUs of 11 GB (RTX 2080 Ti) in two machines, or 8 V100; with 8 of the former the reference ran out of
memory. Its training times are not published.
Weights: no model zoo of detectron2 has them. Put Microsoft's ``swin_tiny_patch4_window7_224.pth`` (release v1.0.0 of
github.com/microsoft/Swin-Transformer) into ``weights/``, or give ``training.init_checkpoint=FILE``.
Settings: the reference's configuration of this row. The implicit teacher has an optimizer of its own, SGD.
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
    mask_rcnn,
    published_training,
    swin_tiny,
)
from serving.config import BenchmarkConfig, ServingConfig
from training.config import OptimizerConfig
from training.distillers import LgdConfig

model = mask_rcnn(
    swin_tiny(out_features=("p0", "p1", "p2", "p3")), bottom_up_features=("p0", "p1", "p2", "p3"), pixels=IMAGENET_RGB
)
dataset = coco()
training = published_training(
    COCO_3X,
    learning_rate=1e-4,
    optimizer="adamw",
    weight_decay=0.05,
    teacher_optimizer=L(OptimizerConfig)(optimizer="sgd", learning_rate=0.02, weight_decay=1e-4),
    init_checkpoint=SWIN_TINY,
)
distiller = L(LgdConfig)(
    use_masks=True,
    context_object=False,
    detach_appearance=True,
    distill_from_iter=30_000,
    freeze_backbone_until_iter=20_000,
)
export = export_800()
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="coco_mask_rcnn_swin_t_800_fp32")
benchmark = L(BenchmarkConfig)()
