"""Every family on every backbone, in every target at every precision: one test body.

In float32 the detections are detectron2's own on the same canvas, by the rule of the main job (:mod:`export.parity`,
with its default limits), in batches and alone. ``make conformance`` holds the full product of families and backbones
to it in torch and in ONNX Runtime on the CPU; engines and the other precisions it holds for every family on one
backbone and for every backbone under one family. ``make test`` runs one of each row and column.

What random weights can show of the other precisions: that the file is written with the types asked for and a float32
tail (writing it raises otherwise), that it runs, and that detections of the same class at the same place are found
again, as many as ``LEAST_FOUND_AGAIN``. That share says nothing of AP: untrained, scores and boxes have no margin
that rounding could stay within, so the limits lie far below what was found and tell a precision from nonsense, no
more. On a CPU 0.98 or more were found in fp16, 0.64 to 0.93 in int8, 0.38 to 0.84 in fp8: RetinaNet on ResNet-18 and
Swin, FCOS on DCNv2, Mask R-CNN on ResNet-18. tf32 and bf16 did not run. What a run finds is recorded; AP at each
precision is measured on trained detectors, by the stage ``validate``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from export import precision as conversion
from export.agreement import agreement, agreement_by_image
from export.detector_graph import FAMILIES as REGISTERED
from export.parity import MatchResult, ParityConfig, combined, match_detections
from export.signature import Detections
from tests.conformance.export_cells import (
    CELLS,
    COLUMN,
    CPU,
    CPU_INT8,
    CUDA,
    ENGINE,
    PRECISIONS,
    ROW,
    TARGETS,
    TORCH,
    Cell,
    Exported,
    NotRun,
    check_runs,
    runner_of,
)
from tests.conformance.small_detectors import BACKBONES, FAMILIES, class_of

LEAST_FOUND_AGAIN = {"tf32": 0.9, "fp16": 0.9, "bf16": 0.4, "int8": 0.3, "fp8": 0.15}
LEAST_MATCHED = 60  # detections of a cell, so that something was compared
OF_A_MATCH = ("num_matched", "num_tolerated", "num_tied", "max_box_error_pixels", "max_score_error", "max_mask_error")
OF_AN_AGREEMENT = ("num_detections", "matched_rate", "iou_p50", "score_error_p50", "score_error_p99")
EVERYDAY = [
    Cell(ROW, COLUMN, CPU, "fp16"),
    Cell(ROW, COLUMN, CPU, "bf16"),
    Cell(ROW, COLUMN, CPU, "fp8"),
    Cell(ROW, COLUMN, CPU_INT8, "int8"),
    Cell(ROW, COLUMN, ENGINE, "tf32"),
    Cell(ROW, COLUMN, CUDA, "fp32"),
    Cell(ROW, "Swin", CPU, "fp32"),
    Cell("DistributionRetinaNet", "ConvNeXt", CPU, "fp32"),
    Cell("FCOS", "DCNv2", CPU, "fp32"),
    Cell("PaperFCOS", "ResNeXt", TORCH, "fp32"),
    Cell("ATSS", "MobileNetV2", TORCH, "fp32"),
    Cell("GFL", "ResNet-50", TORCH, "fp32"),
    Cell("FasterRCNN", "ConvNeXt", TORCH, "fp32"),
    Cell("MaskRCNN", "MobileNetV2", TORCH, "fp32"),
]
STAND_IN = Path(__file__).parents[1] / "stand_in"
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Exported]]:
    """The detector of a family on a backbone; the last one is kept, cells come in order."""

    @functools.lru_cache(maxsize=1)
    def exported(family: str, backbone: str) -> Exported:
        return Exported(family, backbone, tmp_path_factory.mktemp("exported"))

    yield exported
    exported.cache_clear()


def check(cell: Cell, exports: Callable[[str, str], Exported], record: Record) -> None:
    """The test body: hold a cell to what it promises, or skip it with the reason."""
    try:
        check_runs(cell)
        exported = exports(cell.family, cell.backbone)
        runner = runner_of(cell, exported)
    except NotRun as reason:
        pytest.skip(f"not run: {reason}")
    with runner:
        found = [*runner.run(exported.images), *runner.run(exported.images[:1])]
    references = [*exported.references, exported.references[0]]
    if cell.target == CPU:
        ops = exported.facts.ops  # normalisations are folded into the plain convolutions that they follow
        assert not set(ops) & {"NonMaxSuppression", "NonZero", "If"}
        assert ops.get("BatchNormalization", 0) <= ops.get("DeformConv", 0)
    if cell.precision == "fp32":
        check_equal(references, found, exported, record)
    else:
        check_found_again(references, found, cell.precision, record)


def check_equal(references: list[Detections], found: list[Detections], exported: Exported, record: Record) -> None:
    limits, signature = ParityConfig(), exported.signature
    result: MatchResult = combined(
        match_detections(
            reference,
            candidate,
            score_threshold=signature.score_threshold,
            max_detections=signature.max_detections,
            min_iou=limits.min_iou,
            max_box_error_pixels=limits.max_box_error_pixels,
            max_score_error=limits.max_score_error,
            max_mask_error=limits.max_mask_error,
            nms_threshold=signature.nms_threshold,
        )
        for reference, candidate in zip(references, found, strict=True)
    )
    for name in OF_A_MATCH:
        record(name, getattr(result, name))
    assert result.num_unmatched == 0, result
    assert result.num_tied <= max(2, limits.max_tied_share * result.num_matched), result
    assert result.num_matched > LEAST_MATCHED


def check_found_again(references: list[Detections], found: list[Detections], precision: str, record: Record) -> None:
    images = agreement_by_image(dict(enumerate(references)), dict(enumerate(found)), score_floor=0.0)
    result = agreement(images.values(), score_floor=0.0)
    assert result.matched_rate, "nothing was found again"
    for name in OF_AN_AGREEMENT:
        record(name, getattr(result, name))
    assert result.num_matched > 2 * LEAST_MATCHED * LEAST_FOUND_AGAIN[precision]
    assert result.matched_rate > LEAST_FOUND_AGAIN[precision]


@pytest.mark.parametrize("cell", EVERYDAY, ids=str)
def test_one_of_each_row_and_column_conforms(
    cell: Cell,
    exports: Callable[[str, str], Exported],
    record_property: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if cell.precision == "fp16":  # ModelOpt's own files: tests/export/test_precision.py
        monkeypatch.setattr(conversion, "MODELOPT", STAND_IN)
    check(cell, exports, record_property)


@pytest.mark.conformance
@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=pytest.mark.xdist_group(f"{cell.family}/{cell.backbone}")) for cell in CELLS],
    ids=map(str, CELLS),
)
def test_every_cell_conforms(cell: Cell, exports: Callable[[str, str], Exported], record_property: Record) -> None:
    check(cell, exports, record_property)


def test_every_registered_family_has_a_row() -> None:
    rows = {next(kind for kind in class_of(family).__mro__ if kind in REGISTERED) for family in FAMILIES}
    assert rows == set(REGISTERED)


def test_the_everyday_cells_are_of_every_row_and_column() -> None:
    for axis, values in enumerate((FAMILIES, BACKBONES, TARGETS, PRECISIONS)):
        assert {cell[axis] for cell in EVERYDAY} == set(values)
    assert set(EVERYDAY) <= set(CELLS)


def test_a_reference_with_a_box_more_or_a_score_moved_does_not_conform(
    exports: Callable[[str, str], Exported],
) -> None:
    exported = exports("PaperFCOS", "ResNeXt")
    references = exported.references
    missing = Detections(
        boxes=references[0].boxes[1:], scores=references[0].scores[1:], labels=references[0].labels[1:]
    )
    moved = Detections(boxes=references[0].boxes, scores=references[0].scores * 0.9, labels=references[0].labels)
    for wrong in (missing, moved):
        with pytest.raises(AssertionError):
            check_equal(references, [wrong, *references[1:]], exported, lambda name, value: None)
    with pytest.raises(AssertionError):
        check_found_again(references, [*references[1:], references[0]], "int8", lambda name, value: None)
