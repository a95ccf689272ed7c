"""GFL with ResNet-34 on COCO: 12 epochs (1x) at one image size, without a distiller.

    make train-export-deploy RECIPE=gfl_r34_1x_single_scale LAUNCH="torchrun --nproc-per-node=8"

Box AP on val2017: 38.9, the student without a teacher in Zheng et al., "Localization Distillation for Dense Object
Detection", CVPR 2022. The detector: Li et al., "Generalized Focal Loss", NeurIPS 2020.
Hardware: not published; sixteen images take eight GPUs of 11 GB, two images each (not measured).
Settings: the reference's, the learning rate by its rule of 0.01 for sixteen images.
Weights: torchvision's ``resnet34``, which detectron2's zoo does not have; ``training.init_checkpoint=FILE`` names
yours.
Uncertain: in the reference the backbone's norms learn scales and offsets and freeze their statistics, here all of them
are frozen; detectron2's p7 has a ReLU before it, the reference's has none. What either changes was not measured.
"""

from detectron2.config import LazyCall as L

from export.parity import ParityConfig
from pipeline.recipe_parts import (
    COCO_12_EPOCHS,
    IMAGENET_RGB,
    SINGLE_SCALE,
    TORCHVISION_R34,
    coco,
    export_800,
    gfl,
    published_training,
    resnet,
)
from serving.config import BenchmarkConfig, ServingConfig
from training.distillers import NoDistillerConfig

model = gfl(resnet(34), pixels=IMAGENET_RGB)
dataset = coco()
training = published_training(
    COCO_12_EPOCHS,
    learning_rate=0.01,
    clip_gradient_value=None,
    short_edge_pixels=SINGLE_SCALE,
    init_checkpoint=TORCHVISION_R34,
)
distiller = L(NoDistillerConfig)()
export = export_800()
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="coco_gfl_r34_800_fp32")
benchmark = L(BenchmarkConfig)()
