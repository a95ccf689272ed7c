"""A detector whose random weights detect, its canvases, and its exported file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import nn

from export.detector_graph import detector_graph, signature_of
from export.signature import Detections, DetectorSignature
from export.targets.onnx_target import OnnxFacts, export_onnx
from tests.conftest import build_tiny_retinanet

CLASS_NAMES = ("a", "b", "c", "d", "e")


def canvases(height: int, width: int, num_images: int, seed: int = 0) -> list[np.ndarray]:
    """Crops of real photos, noise, and flat images, as uint8 (3, H, W); some end before the canvas does."""
    generator = np.random.default_rng(seed)
    photos = [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket", "retina")]
    result = []
    for index in range(num_images):
        photo = photos[index % len(photos)]
        top, left = (int(generator.integers(0, extent - 100)) for extent in photo.shape[:2])
        crop = photo[top : top + height, left : left + width].transpose(2, 0, 1)
        canvas = np.broadcast_to(np.array([124, 116, 104], np.uint8)[:, None, None], (3, height, width)).copy()
        canvas[:, : crop.shape[1], : crop.shape[2]] = crop
        if index % 10 == 8:
            canvas = generator.integers(0, 256, canvas.shape, dtype=np.uint8)
        elif index % 10 == 9:
            canvas[:] = 0
        result.append(canvas)
    return result


def calibrated_retinanet(seed: int = 0) -> RetinaNet:
    """The tiny RetinaNet with random weights that detect."""
    detector = build_tiny_retinanet(num_classes=len(CLASS_NAMES), seed=seed)
    calibrate(detector)
    return detector


def calibrate(detector: RetinaNet) -> None:
    """Scale the head so that hundreds of boxes of varied score and shape pass the threshold."""
    images = torch.from_numpy(np.stack(canvases(256, 256, 4, seed=1))).float()
    with torch.no_grad():
        features = detector.backbone((images - detector.pixel_mean) / detector.pixel_std)
        features = [features[name] for name in detector.head_in_features]
        logits, deltas = detector.head(features)
        detector.head.cls_score.weight.div_(torch.cat([x.flatten() for x in logits]).std())
        detector.head.bbox_pred.weight.mul_(0.3 / torch.cat([x.flatten() for x in deltas]).std())
        detector.head.cls_score.bias.zero_()
        logits = torch.cat([x.flatten(1) for x in detector.head(features)[0]], dim=1)
        passing = logits.sort(dim=1, descending=True).values[:, 600].mean()
        detector.head.cls_score.bias.fill_(float(torch.logit(torch.tensor(detector.test_score_thresh)) - passing))


def signature_for(detector: RetinaNet, height: int, width: int) -> DetectorSignature:
    return signature_of(
        detector,
        canvas=(height, width),
        short_edge=min(height, width),
        max_edge=max(height, width),
        class_names=CLASS_NAMES,
        category_ids=(1, 2, 4, 8, 16),
        max_batch_size=8,
    )


def detectron2_detections(detector: RetinaNet, canvas: np.ndarray) -> Detections:
    """detectron2's own inference on the canvas."""
    with torch.no_grad():
        found = detector([{"image": torch.from_numpy(canvas)}])[0]["instances"]
    return Detections(
        boxes=found.pred_boxes.tensor.numpy(),
        scores=found.scores.numpy(),
        labels=found.pred_classes.numpy().astype(np.int32),
    )


@dataclasses.dataclass(frozen=True)
class Exported:
    detector: RetinaNet
    signature: DetectorSignature
    graph: nn.Module
    path: Path
    facts: OnnxFacts


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    detector = calibrated_retinanet()
    signature = signature_for(detector, 192, 320)  # not square, so that no one can mix up the sides
    graph = detector_graph(detector, signature)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return Exported(detector, signature, graph, path, export_onnx(graph, signature, path))
