"""Two-stage students from annotations to losses and AP, with masks and without."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from pycocotools import mask as coco_mask
from torch import nn
from two_stage_detectors import tiny_faster_rcnn, tiny_mask_rcnn

from tests.training.training_runs import LGD, coco_of_equal_images, config, run
from training.dataset import CocoDataset, DatasetError, read_coco
from training.embedded_dataset import generate
from training.evaluate import evaluate_detector
from training.loader import training_loader
from training.mask_annotations import check_masks
from training.train import distilled_detector


def with_polygons(dataset: CocoDataset, *, without: int = 0) -> CocoDataset:
    """The data set with a triangle in each box, but for the first ``without`` annotations; the last image empty."""
    document = json.loads(dataset.annotation_file.read_text())
    last = document["images"][-1]["id"]
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] != last]
    for entry in document["annotations"][without:]:
        x, y, width, height = entry["bbox"]
        entry["segmentation"] = [[x, y, x + width, y, x, y + height]]
    dataset.annotation_file.write_text(json.dumps(document))
    return read_coco(dataset.annotation_file, dataset.image_dir)


@pytest.fixture
def triangles(tmp_path: Path) -> CocoDataset:
    return with_polygons(coco_of_equal_images(tmp_path / "data"))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    train_file, _ = generate(tmp_path_factory.mktemp("embedded"), num_train=8, num_validation=1)
    return read_coco(train_file)


@pytest.mark.parametrize("build", [tiny_mask_rcnn, tiny_faster_rcnn])
def test_two_stage_students_train_with_lgd_evaluate_and_are_scored_with_their_teacher(
    build: Callable[[int], nn.Module], triangles: CocoDataset, tmp_path: Path
) -> None:
    student = build(len(triangles.class_names))
    settings = config(max_iter=3, evaluate_at=(1.0,), images_per_batch=3)
    result = run(tmp_path, triangles, settings, student=student)
    scores = result.ap_curve[-1]
    has_masks = build is tiny_mask_rcnn
    assert ("segm_AP" in scores) == has_masks
    assert all(math.isfinite(value) for value in scores.values())
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    names = {name for line in lines for name in line if name.startswith("loss_")}
    stock = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"} | ({"loss_mask"} if has_masks else set())
    assert names == stock | {f"{name}.tea" for name in stock} | {"loss_distill"}


def test_polygons_stay_polygons_and_an_image_without_objects_is_a_batch_like_any_other(triangles: CocoDataset) -> None:
    student = tiny_mask_rcnn(len(triangles.class_names))
    batches = iter(training_loader(student, config(images_per_batch=1), triangles, start_iter=0))
    seen = [next(batches)[0] for _ in range(triangles.num_images)]
    labelled = [item["instances"] for item in seen if len(item["instances"])]
    assert len(labelled) == triangles.num_images - 1
    for instances in labelled:
        assert isinstance(instances.gt_masks, PolygonMasks)
        boxes = instances.gt_boxes.tensor
        half = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 2
        torch.testing.assert_close(instances.gt_masks.area().float(), half, rtol=1e-3, atol=1)
    detector = distilled_detector(student, LGD).train()
    (empty,) = [item for item in seen if not len(item["instances"])]
    with EventStorage():
        for batch in ([empty], [empty, seen[0], seen[1]]):
            losses = detector(batch)
            sum(losses.values()).backward()
            assert all(torch.isfinite(loss) for loss in losses.values()), losses


def test_run_length_encodings_become_bitmasks_that_cover_what_the_data_set_says(embedded: CocoDataset) -> None:
    student = tiny_mask_rcnn(len(embedded.class_names))
    settings = config(images_per_batch=1, short_edge_pixels=(160,), max_edge_pixels=256)
    document = json.loads(embedded.annotation_file.read_text())
    sizes = {str(embedded.image_dir / image["file_name"]): image for image in document["images"]}
    batches = iter(training_loader(student, settings, embedded, start_iter=0))
    num_masks = 0
    for _ in range(embedded.num_images):
        (item,) = next(batches)
        instances, image = item["instances"], sizes[item["file_name"]]
        if not len(instances):
            continue
        assert isinstance(instances.gt_masks, BitMasks)
        truth = [a for a in document["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        scale = instances.image_size[0] * instances.image_size[1] / (image["height"] * image["width"])
        expected = scale * sum(coco_mask.area(entry["segmentation"]) for entry in truth)
        found = float(instances.gt_masks.tensor.sum())
        assert found == pytest.approx(expected, rel=0.1)
        num_masks += len(instances)
    assert num_masks > 20


def test_a_student_of_boxes_needs_no_masks_and_gets_none(triangles: CocoDataset) -> None:
    student = tiny_faster_rcnn(len(triangles.class_names))
    (item, *_) = next(iter(training_loader(student, config(), triangles, start_iter=0)))
    assert not item["instances"].has("gt_masks")


def test_annotations_without_masks_are_refused_before_the_first_iteration(tmp_path: Path) -> None:
    dataset = with_polygons(coco_of_equal_images(tmp_path / "data"), without=2)
    with pytest.raises(DatasetError, match=r"2 of 10 annotations have no usable segmentation.*image id 0") as error:
        run(tmp_path / "r", dataset, config(), student=tiny_mask_rcnn(3))
    assert error.value.exit_code == 2
    assert not (tmp_path / "r").exists()
    check_masks(tiny_faster_rcnn(3), dataset)


class _Perfect(nn.Module):
    """Finds what is labelled, with its mask or with the mask of the whole box."""

    def __init__(self, *, exact: bool) -> None:
        super().__init__()
        self.input_format = "BGR"
        self.roi_heads = nn.Module()
        self.roi_heads.mask_on = True
        self._exact = exact

    def forward(self, inputs: list[dict]) -> list[dict]:
        outputs = []
        for given in inputs:
            truth, size = given["instances"], (given["height"], given["width"])
            found = Instances(size)
            found.pred_boxes, found.pred_classes = truth.gt_boxes, truth.gt_classes
            found.scores = torch.full((len(truth),), 0.9)
            masks = np.zeros((len(truth), *size), dtype=bool)
            for mask, box, index in zip(masks, truth.gt_boxes.tensor.numpy(), range(len(truth)), strict=True):
                x1, y1, x2, y2 = box.round().astype(int)
                mask[y1:y2, x1:x2] = True
                if self._exact:
                    polygons = truth.gt_masks.polygons[index]
                    mask[:] = coco_mask.decode(coco_mask.frPyObjects([p.tolist() for p in polygons], *size))[..., 0]
            found.pred_masks = torch.from_numpy(masks)
            outputs.append({"instances": found})
        return outputs


def test_mask_ap_judges_the_masks_and_box_ap_the_boxes(triangles: CocoDataset, tmp_path: Path) -> None:
    scores = {
        exact: evaluate_detector(
            _Perfect(exact=exact),
            triangles,
            short_edge_pixels=96,
            max_edge_pixels=128,
            output_directory=tmp_path / str(exact),
            keep_labels=True,
        )
        for exact in (True, False)
    }
    assert scores[True]["AP"] == scores[False]["AP"] == pytest.approx(100)
    assert scores[True]["segm_AP"] == pytest.approx(100)
    assert scores[False]["segm_AP"] < 20, "a box is twice the triangle in it: IoU 0.5"
