"""Write the golden config.pbtxt of each backend into model_repository/ (`make golden`); read the diff afterwards.

The signature is the embedded recipe's: what `make train-export-deploy` publishes, without the run's provenance.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from export.signature import DetectorSignature  # noqa: E402
from serving.model_config import DynamicBatching, InstanceGroup, ModelConfig, model_config_for  # noqa: E402

SIGNATURE = DetectorSignature(
    canvas_height=256,
    canvas_width=256,
    short_edge_pixels=192,
    max_edge_pixels=256,
    channel_order="RGB",
    pad_value=(124, 116, 104),
    max_batch_size=8,
    max_detections=100,
    score_threshold=0.05,
    nms_threshold=0.5,
    class_names=("bee", "fish", "frog"),
    category_ids=(1, 2, 3),
)


def golden_configs() -> dict[str, ModelConfig]:
    """The golden configuration of each backend, by the name of its folder in model_repository/."""
    batching = DynamicBatching(max_queue_delay_microseconds=500, max_queue_size=512)
    gpu = InstanceGroup(kind="GPU", count=1, gpus=(0,))
    provenance = {"run": "golden"}
    return {
        "golden_python": model_config_for(
            SIGNATURE,
            name="golden_python",
            backend="python",
            provenance=provenance,
            dynamic_batching=batching,
            num_threads=2,
        ),
        "golden_python_tensorrt": model_config_for(
            SIGNATURE,
            name="golden_python_tensorrt",
            backend="python_tensorrt",
            provenance=provenance,
            dynamic_batching=batching,
            instance_group=gpu,
        ),
        "golden_onnxruntime": model_config_for(
            SIGNATURE,
            name="golden_onnxruntime",
            backend="onnxruntime",
            provenance=provenance,
            dynamic_batching=batching,
            instance_group=gpu,
            num_threads=2,
        ),
        "golden_tensorrt": model_config_for(
            SIGNATURE,
            name="golden_tensorrt",
            backend="tensorrt",
            provenance=provenance,
            dynamic_batching=batching,
            instance_group=gpu,
        ),
    }


if __name__ == "__main__":
    for name, config in golden_configs().items():
        folder = ROOT / "model_repository" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.pbtxt").write_text(config.to_pbtxt())
