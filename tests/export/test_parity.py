from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.parity import MatchResult, batch_invariance, combined, match_detections, pairwise_iou
from export.runners import OnnxRuntimeRunner, RunFailed, Runner, TorchRunner
from export.signature import Detections
from tests.export.conftest import Exported, canvases
from tests.serving.pixel_means import make_signature

BOXES = [[0, 0, 50, 50], [10, 10, 60, 90], [100, 100, 104, 104]]


def detections(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        labels=np.array(labels, np.int32),
    )


def match(reference: Detections, candidate: Detections, score_floor: float = 0.0) -> MatchResult:
    return match_detections(reference, candidate, score_threshold=0.05, max_detections=100, score_floor=score_floor)


def test_equal_detections_in_another_order_match() -> None:
    a = detections(BOXES, [0.9, 0.9, 0.9], [0, 1, 2])
    b = detections(BOXES[::-1], [0.9, 0.9, 0.9], [2, 1, 0])
    result = match(a, b)
    assert (result.num_matched, result.num_unmatched, result.num_tolerated) == (3, 0, 0)
    assert (result.min_iou, result.max_score_error, result.max_box_error_pixels) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("boxes", "scores", "labels"),
    [
        ([[0, 0, 50, 50], [10, 10, 60, 90], [100, 100, 104, 104.1]], [0.9, 0.8, 0.7], [0, 1, 2]),
        (BOXES, [0.9, 0.8, 0.698], [0, 1, 2]),
        (BOXES, [0.9, 0.8, 0.7], [0, 1, 1]),
    ],
    ids=["box moved", "score moved", "class changed"],
)
def test_a_change_beyond_the_limits_leaves_both_sides_unmatched(
    boxes: list[list[float]], scores: list[float], labels: list[int]
) -> None:
    result = match(detections(BOXES, [0.9, 0.8, 0.7], [0, 1, 2]), detections(boxes, scores, labels))
    assert (result.num_matched, result.num_unmatched) == (2, 2)
    assert result.unmatched_images == (0,)


def test_a_small_box_may_miss_the_iou_when_every_coordinate_is_near_and_a_large_one_the_coordinates() -> None:
    a = detections([[100, 100, 104, 104], [0, 0, 1000, 1000]], [0.9, 0.8], [0, 0])
    b = detections([[100.008, 100, 104, 104], [0.2, 0, 1000, 1000]], [0.9, 0.8], [0, 0])
    result = match(a, b)
    assert result.num_matched == 2
    assert result.min_iou < 0.999
    assert result.max_box_error_pixels == pytest.approx(0.2)


def test_one_detection_is_not_the_partner_of_two() -> None:
    result = match(detections([BOXES[0]], [0.9], [0]), detections([BOXES[0]] * 2, [0.9, 0.9], [0, 0]))
    assert (result.num_matched, result.num_unmatched) == (1, 1)


def test_an_unpaired_detection_is_tolerated_only_beside_a_cut_off() -> None:
    nothing = detections([], [], [])
    assert match(nothing, detections([BOXES[0]], [0.0505], [0])).num_tolerated == 1
    assert match(detections([BOXES[0]], [0.0505], [0]), nothing).num_unmatched == 0
    assert match(nothing, detections([BOXES[0]], [0.06], [0])).num_unmatched == 1
    full = detections(
        [[i * 60, 0, i * 60 + 50, 50] for i in range(100)], np.linspace(0.9, 0.4, 100).tolist(), [0] * 100
    )
    swapped = dataclasses.replace(full, labels=np.array([0] * 99 + [1], np.int32))
    assert match(full, swapped).num_tolerated == 2
    shorter = full.above(0.45)
    assert match(shorter, shorter.above(0.46)).num_unmatched > 0


def test_of_equal_scores_nms_may_have_kept_the_other_and_the_two_are_counted_apart() -> None:
    kept = detections([[0, 0, 50, 50], [100, 0, 150, 50]], [0.99995, 0.6], [0, 0])
    other = detections([[1, 1, 51, 51], [100, 0, 150, 50]], [0.99995, 0.6], [0, 0])
    result = match_detections(kept, other, score_threshold=0.05, max_detections=100, nms_threshold=0.5)
    assert (result.num_matched, result.num_unmatched, result.num_tied) == (1, 0, 2)
    assert match(kept, other).num_unmatched == 2, "not asked for"
    assert combined([result, result]).num_tied == 4
    for changed in (
        dataclasses.replace(other, scores=np.array([0.9999, 0.6], np.float32)),
        dataclasses.replace(other, labels=np.array([1, 0], np.int32)),
        dataclasses.replace(other, boxes=other.boxes + np.array([[30, 30, 30, 30], [0, 0, 0, 0]], np.float32)),
    ):
        result = match_detections(kept, changed, score_threshold=0.05, max_detections=100, nms_threshold=0.5)
        assert (result.num_unmatched, result.num_tied) == (2, 0)


def test_below_the_floor_no_partner_is_needed() -> None:
    a, b = detections(BOXES, [0.9, 0.8, 0.2], [0, 1, 2]), detections(BOXES[:2], [0.9, 0.8], [0, 1])
    assert match(a, b, score_floor=0.3).num_unmatched == 0
    assert match(a, b).num_unmatched == 1


def test_results_add_up_over_images_and_become_json() -> None:
    good = match(detections(BOXES, [0.9] * 3, [0, 1, 2]), detections(BOXES, [0.8995] * 3, [0, 1, 2]))
    bad = match(detections(BOXES[:1], [0.9], [0]), detections([], [], []))
    total = combined([good, bad, good, bad])
    assert (total.num_images, total.num_matched, total.num_unmatched) == (4, 6, 2)
    assert total.unmatched_images == (1, 3)
    assert total.max_score_error == pytest.approx(5e-4, rel=1e-3)
    assert json.loads(json.dumps(dataclasses.asdict(total)))["unmatched_images"] == [1, 3]


def test_iou_of_boxes_without_area_is_zero() -> None:
    boxes = np.array([[0, 0, 0, 0], [0, 0, 10, 10], [5, 0, 15, 10]], np.float32)
    np.testing.assert_allclose(pairwise_iou(boxes, boxes), [[0, 0, 0], [0, 1, 1 / 3], [0, 1 / 3, 1]])


def test_the_exported_file_gives_an_image_the_same_detections_in_every_batch(exported: Exported) -> None:
    signature = exported.signature
    images = canvases(signature.canvas_height, signature.canvas_width, 11)
    with OnnxRuntimeRunner(exported.path, signature, num_threads=1) as runner:
        result = batch_invariance(runner, images, score_floor=0.05)
    assert (result.num_images, result.num_unmatched, result.failed) == (11, 0, ())
    assert result.batch_sizes == (1, 2, 3, 8)


class _Recorder(Runner):
    """Finds in an image of brightness b one box with score b / 255, and remembers the sizes of its batches."""

    name = "recorder"

    def __init__(self, max_batch_size: int) -> None:
        self.signature = make_signature(max_batch_size=max_batch_size)
        self.batch_sizes: list[int] = []

    def run(self, images: np.ndarray) -> list[Detections]:
        self.batch_sizes.append(len(images))
        return [detections([[0, 0, 9, 9]], [float(image[0, 0, 0]) / 255], [0]) for image in images]


class _SpoilsFullBatches(_Recorder):
    def run(self, images: np.ndarray) -> list[Detections]:
        spoilt = len(images) == self.signature.max_batch_size
        return super().run(images[::-1] if spoilt else images)


class _KeepsWhatAFullBatchLeft(_Recorder):
    """A batch smaller than the one before gets that one's answers, as from a buffer that was not written anew."""

    def __init__(self, max_batch_size: int) -> None:
        super().__init__(max_batch_size)
        self._buffer: list[Detections] = []

    def run(self, images: np.ndarray) -> list[Detections]:
        if len(images) >= len(self._buffer):
            self._buffer = super().run(images)
        return self._buffer[: len(images)]


def brightnesses(num_images: int) -> list[np.ndarray]:
    return [np.full((3, 48, 64), 60 + 10 * index, np.uint8) for index in range(num_images)]


class _RunsOneByOne(_Recorder):
    def run(self, images: np.ndarray) -> list[Detections]:
        if len(images) > 1:
            raise RunFailed("only one")
        return super().run(images)


def test_a_batch_that_does_not_run_counts_as_all_of_its_detections_changed() -> None:
    result = batch_invariance(_RunsOneByOne(2), brightnesses(3), score_floor=0.05)
    assert result.failed == ("batches of 2: only one", "shuffled, batches of 2: only one")
    assert result.num_unmatched == 2 * 3


@pytest.mark.parametrize(("num_images", "largest"), [(4, 8), (5, 2), (6, 3), (8, 8), (12, 4), (19, 8), (1, 16)])
def test_every_size_comes_as_a_full_batch_and_with_a_ragged_one_behind_it(num_images: int, largest: int) -> None:
    runner = _Recorder(largest)
    result = batch_invariance(runner, brightnesses(num_images), score_floor=0.05)
    assert result.failed == ()
    tried = runner.batch_sizes
    followed = {(a, b) for a, b in itertools.pairwise(tried) if b < a}
    assert {1, min(2, largest), min(3, largest), largest} <= set(result.batch_sizes)
    for size in {min(2, largest), min(3, largest), largest}:
        assert any(a == size for a, _ in followed), f"no ragged batch behind one of {size}"


def test_a_largest_batch_of_one_has_no_ragged_end() -> None:
    result = batch_invariance(_Recorder(1), brightnesses(3), score_floor=0.05)
    assert (result.batch_sizes, result.failed) == ((1,), ())


@pytest.mark.parametrize("runner_class", [_SpoilsFullBatches, _KeepsWhatAFullBatchLeft])
def test_a_fault_of_the_largest_batch_is_caught_with_fewer_images_than_it_holds(
    runner_class: type[_Recorder],
) -> None:
    result = batch_invariance(runner_class(8), brightnesses(5), score_floor=0.05)
    assert result.num_unmatched > 0
    assert {"batches of 8", "shuffled, batches of 8"} <= set(result.failed)


class _LeaksIntoTheNextImage(nn.Module):
    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        mixed = images.clone()
        mixed[1:, :, :64] = images[:-1, :, :64]
        return self.graph(mixed)


def test_a_graph_in_which_images_of_a_batch_mix_is_caught(exported: Exported) -> None:
    signature = exported.signature
    images = canvases(signature.canvas_height, signature.canvas_width, 5)
    with torch.no_grad():
        result = batch_invariance(
            TorchRunner(_LeaksIntoTheNextImage(exported.graph), signature), images, score_floor=0.05
        )
    assert result.num_unmatched > 0
    assert result.failed == ("batches of 2", "batches of 3", "batches of 8", "shuffled, batches of 8")
