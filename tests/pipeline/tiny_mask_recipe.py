"""The whole pipeline with masks in seconds: a narrow Mask R-CNN with random weights, three iterations."""

from detectron2.config import LazyCall as L

from export.config import ExportConfig
from export.parity import ParityConfig
from pipeline.recipe_parts import mask_rcnn, resnet
from serving.config import BenchmarkConfig, ServingConfig
from training.config import TrainingConfig
from training.dataset_config import DatasetConfig
from training.distillers import LgdConfig

model = mask_rcnn(
    resnet(18, norm="BN", freeze_at=0, out_features=("res2", "res3", "res4", "res5")),
    channels=32,
    smallest_anchor_pixels=16,
    num_proposals=100,
    box_head_channels=[64],
    mask_head_channels=[16, 16],
)
# Three iterations leave every score near that of a guess: a threshold below it gives the later stages detections.
model.roi_heads.box_predictor.test_score_thresh = 0.01
dataset = L(DatasetConfig)(num_train=12, num_validation=6)
training = L(TrainingConfig)(
    max_iter=3,
    images_per_batch=2,
    learning_rate=0.002,
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
parity = L(ParityConfig)(num_matching_images=6, num_batch_images=5, min_matched_score=0.01)
serving = L(ServingConfig)(model_name="tiny_mask")
benchmark = L(BenchmarkConfig)(concurrencies=[1], seconds_per_point=0.5, num_images=4, warmup_requests=2)
