"""The whole pipeline in seconds: a few small images, a narrow RetinaNet without pretrained weights, four iterations."""

from detectron2.config import LazyCall as L

from export.config import ExportConfig
from export.parity import ParityConfig
from pipeline.recipe_parts import retinanet, timm_backbone
from serving.config import BenchmarkConfig, ServingConfig
from training.config import TrainingConfig
from training.dataset import DatasetConfig
from training.distillers import LgdConfig

model = retinanet(
    timm_backbone("mobilenetv2_035", weights=None, freeze_norm=False),
    channels=32,
    num_head_convs=1,
    smallest_anchor_pixels=16,
)
# Four iterations leave every score near the prior of 0.01: a threshold below it gives the later stages detections.
model.test_score_thresh = 0.005
model.test_topk_candidates = 100
dataset = L(DatasetConfig)(num_train=12, num_validation=10)
training = L(TrainingConfig)(
    max_iter=4,
    images_per_batch=2,
    learning_rate=0.001,
    warmup_iters=0,
    short_edge_pixels=[96],
    max_edge_pixels=128,
    skip_empty_images=False,
    num_workers=0,
    checkpoint_period_iters=2,
    log_period_iters=1,
)
distiller = L(LgdConfig)(distill_from_iter=1, freeze_backbone_until_iter=1)
export = L(ExportConfig)(
    canvas=[128, 128], short_edge_pixels=96, max_edge_pixels=128, max_batch_size=4, compute_capabilities=["75", "89"]
)
# As low as the scores are: what counts where rungs are compared.
parity = L(ParityConfig)(num_matching_images=10, num_batch_images=7, min_matched_score=0.005)
serving = L(ServingConfig)(model_name="tiny")
benchmark = L(BenchmarkConfig)(concurrencies=[1, 4], seconds_per_point=0.5, num_images=8, warmup_requests=2)
