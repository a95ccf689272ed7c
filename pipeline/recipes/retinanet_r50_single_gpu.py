"""RetinaNet with ResNet-50 on a data set of some thousand small images, with LGD: minutes on one modern GPU.

    make train-export-deploy RECIPE=retinanet_r50_single_gpu \\
        SET="dataset.train=/data/instances_train.json dataset.validation=/data/instances_val.json"
    make train-export-deploy RECIPE=retinanet_r50_single_gpu NAME=retinanet_r50_single_gpu_baseline \\
        SET="distiller=none dataset.train=/data/instances_train.json dataset.validation=/data/instances_val.json"
    python -m pipeline compare retinanet_r50_single_gpu,distiller=none retinanet_r50_single_gpu \\
        dataset.train=/data/instances_train.json dataset.validation=/data/instances_val.json --seeds 3

The sizes are meant for about 1,800 images in COCO format, longest side about 400: 27 epochs at 0.4 times COCO's usual
scale. For another number of images scale ``training.max_iter``, ``training.lr_decay_iters``,
``distiller.distill_from_iter`` and ``distiller.freeze_backbone_until_iter`` together.
Hardware: one GPU that computes in bfloat16, 24 GB or more (not measured); ``training.accumulate_batches=4`` for less.
Results: neither a baseline nor LGD is published at this size. The schedule has the ratios of the paper's 1x schedule;
LGD's teacher is the one for short schedules (docs/training.md).
Weights: torchvision's, from detectron2's zoo; ``training.init_checkpoint=FILE`` takes a local copy or a state dict of
torchvision's ``resnet50``. For timm's weights copy this file, with ``timm_backbone("resnet50", weights="timm",
freeze_norm=True)`` in place of ``resnet(…)`` and without ``init_checkpoint``.
"""

from detectron2.config import LazyCall as L

from export.config import ExportConfig
from export.parity import ParityConfig
from pipeline.recipe_parts import IMAGENET_RGB, TORCHVISION_R50, resnet, retinanet
from serving.config import BenchmarkConfig, ServingConfig
from training.config import TrainingConfig
from training.dataset_config import DatasetConfig
from training.distillers import LgdConfig

model = retinanet(resnet(50, stride_in_1x1=False), top_block_in="res5", smallest_anchor_pixels=16, pixels=IMAGENET_RGB)
dataset = L(DatasetConfig)(drop_degenerate_boxes=True)
training = L(TrainingConfig)(
    max_iter=1500,
    images_per_batch=32,
    learning_rate=0.02,
    lr_decay_iters=[1000, 1333],
    warmup_iters=100,
    short_edge_pixels=[256, 272, 288, 304, 320],
    max_edge_pixels=533,
    num_workers=8,
    checkpoint_period_iters=250,
    evaluate_at=[0.25, 0.5, 0.75, 1.0],
    precision="bf16",
    init_checkpoint=TORCHVISION_R50,
)
distiller = L(LgdConfig)(
    detach_appearance=True,
    soft_masks=True,
    residual=True,
    teacher_trains_head=False,
    distill_from_iter=330,
    freeze_backbone_until_iter=165,
)
export = L(ExportConfig)(canvas=[320, 544], short_edge_pixels=320, max_edge_pixels=533)
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="own_retinanet_r50_320_fp32")
benchmark = L(BenchmarkConfig)()
