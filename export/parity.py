"""Agreement of two runners, detection by detection, and of one runner with itself over batch sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from export.runners import RunFailed, Runner
from export.signature import Detections

MAX_TIE = 1e-6  # scores nearer than this are equal, but for the rounding of a sigmoid or softmax


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """The recipe's ``parity`` section: every limit that stops a run between export and serving.

    Attributes:
        max_ap_drop_canvas: how many AP points torch may lose on the fixed canvas against detectron2's own
            preprocessing. Gates of AP are one-sided: a rung may gain, and what must not change at all is held to the
            detections one by one. Larger than the others, because the canvas is a choice and changes every image: a
            cost to be seen, while a fault in it costs far more.
        max_ap_drop_graph: the same of the export graph in torch, against torch on the canvas.
        max_ap_drop_onnxruntime: the same of ONNX Runtime, against the graph and against torch on the canvas.
        max_ap_drop_tensorrt: the same of a float32 engine, against ONNX Runtime and torch on the canvas.
        max_ap_drop_served: the same of the live endpoint, against what it serves in process; and of requests that the
            server puts into batches, against requests one by one.
        max_ap_drop_half: the same of an fp16 or bf16 file or engine, against torch on the canvas.
        min_ap_share_quantized: smallest share of that AP that an int8 or fp8 file or engine must reach.
        num_matching_images: validation images whose detections are matched one by one against detectron2's own.
        min_iou, max_box_error_pixels: a pair matches with this IoU or with every coordinate this near.
        max_score_error: and with scores this near; also how near the score threshold, or the last kept score of a full
            list, an unmatched detection must be to be forgiven.
        max_mask_error: and with masks whose probabilities differ by this on average, where there are masks.
        max_head_error: largest difference of an element of what the head predicts, as a share of the largest magnitude,
            of the graph and of ONNX Runtime: a level on which no validation image has an object shows nowhere else.
        max_tied_share: largest share of detections of which NMS may have kept another of the same score.
        num_batch_images: images of the batch invariance test.
        min_matched_score: above it no detection may change with the batch the image is in, and from it on detections
            count where two rungs are compared.
    """

    max_ap_drop_canvas: float = 3.0
    max_ap_drop_graph: float = 0.05
    max_ap_drop_onnxruntime: float = 0.05
    max_ap_drop_tensorrt: float = 0.1
    max_ap_drop_served: float = 0.05
    max_ap_drop_half: float = 0.1
    min_ap_share_quantized: float = 0.99
    num_matching_images: int = 100
    min_iou: float = 0.999
    max_box_error_pixels: float = 0.01
    max_score_error: float = 1e-3
    max_mask_error: float = 1e-3
    max_head_error: float = 1e-3
    max_tied_share: float = 0.005
    num_batch_images: int = 19
    min_matched_score: float = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchResult:
    """How the detections of two runners agree, over one or more images.

    Attributes:
        num_images: images compared.
        num_matched: pairs.
        num_unmatched: detections of either side without a partner and without an excuse.
        num_tolerated: unpaired detections so near a cut-off that rounding decides whether they exist.
        num_tied: unpaired detections of which NMS kept the other, because both have one score. A score near 1 is one
            float for a thousand logits, and which of equal ones comes first is left open by ``torch.topk``.
        min_iou, max_score_error, max_box_error_pixels: the worst over the pairs.
        max_mask_error: the same of the masks' mean absolute difference; 0 without masks.
        unmatched_images: positions of the images with unmatched detections.
    """

    num_images: int = 0
    num_matched: int = 0
    num_unmatched: int = 0
    num_tolerated: int = 0
    num_tied: int = 0
    min_iou: float = 1.0
    max_score_error: float = 0.0
    max_box_error_pixels: float = 0.0
    max_mask_error: float = 0.0
    unmatched_images: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchInvariance:
    """Whether an image's detections depend on the batch it is in.

    Attributes:
        num_images: images compared.
        batch_sizes: sizes tried.
        num_unmatched: detections above ``score_floor`` that changed, summed over all arrangements.
        score_floor: what counts.
        failed: arrangements with unmatched detections, or that do not run; what these had to find is unmatched.
    """

    num_images: int
    batch_sizes: tuple[int, ...]
    num_unmatched: int
    score_floor: float
    failed: tuple[str, ...]


def match_detections(
    reference: Detections,
    candidate: Detections,
    *,
    score_threshold: float,
    max_detections: int,
    min_iou: float = 0.999,
    max_box_error_pixels: float = 0.01,
    max_score_error: float = 1e-3,
    max_mask_error: float = 1e-3,
    score_floor: float = 0.0,
    nms_threshold: float | None = None,
) -> MatchResult:
    """Pair the detections of one image, each with at most one, by falling score.

    A pair has the same class, scores within ``max_score_error``, IoU >= ``min_iou`` or every coordinate within
    ``max_box_error_pixels``, and masks, where there are any, within ``max_mask_error``; of several possible partners
    the nearest box is taken, of equal boxes (several can be the whole canvas) the nearest score.

    Args:
        reference, candidate: boxes in the same pixels.
        score_threshold, max_detections: the graph's own (:class:`~export.signature.DetectorSignature`). An unpaired
            detection within ``max_score_error`` of the threshold, or of the last score of a full list, is tolerated:
            there a rounding error decides about existence.
        score_floor: detections with this score or less may have no partner.
        nms_threshold: with it, two unpaired detections of one class and score that overlap by more are ``num_tied``.
            They look like one box that moved, so the caller has to limit their number.

    Raises:
        ValueError: one side has masks and the other has none.
    """
    same_class = reference.labels[:, None] == candidate.labels[None, :]
    score_error = np.abs(reference.scores[:, None] - candidate.scores[None, :])
    box_error = np.abs(reference.boxes[:, None] - candidate.boxes[None, :]).max(axis=2, initial=0)
    iou = pairwise_iou(reference.boxes, candidate.boxes)
    possible = same_class & (score_error <= max_score_error) & ((iou >= min_iou) | (box_error <= max_box_error_pixels))
    mask_error = _mask_error(reference, candidate, possible)
    possible &= mask_error <= max_mask_error
    pairs: list[tuple[int, int]] = []
    free = np.ones(len(candidate), dtype=bool)
    for i in np.argsort(-reference.scores, kind="stable").tolist():
        partners = np.flatnonzero(possible[i] & free)
        if partners.size:
            j = int(partners[np.lexsort((score_error[i, partners], box_error[i, partners]))[0]])
            free[j] = False
            pairs.append((i, j))
    cut_offs = [score_threshold] + [
        float(side.scores.min()) for side in (reference, candidate) if len(side) >= max_detections
    ]
    left = np.ones(len(reference), dtype=bool)
    left[[i for i, _ in pairs]] = False
    num_tied = 0
    if nms_threshold is not None:
        tied = same_class & (score_error <= MAX_TIE) & (iou > nms_threshold)
        for i in np.flatnonzero(left).tolist():
            others = np.flatnonzero(tied[i] & free)
            if others.size:
                left[i] = free[others[0]] = False
                num_tied += 2
    unpaired = np.concatenate([reference.scores[left], candidate.scores[free]])
    unpaired = unpaired[unpaired > score_floor]
    tolerated = np.zeros(len(unpaired), dtype=bool)
    for cut_off in cut_offs:
        tolerated |= np.abs(unpaired - cut_off) <= max_score_error
    num_unmatched = int((~tolerated).sum())
    return MatchResult(
        num_images=1,
        num_matched=len(pairs),
        num_unmatched=num_unmatched,
        num_tolerated=int(tolerated.sum()),
        num_tied=num_tied,
        min_iou=min((float(iou[pair]) for pair in pairs), default=1.0),
        max_score_error=max((float(score_error[pair]) for pair in pairs), default=0.0),
        max_box_error_pixels=max((float(box_error[pair]) for pair in pairs), default=0.0),
        max_mask_error=max((float(mask_error[pair]) for pair in pairs), default=0.0),
        unmatched_images=(0,) if num_unmatched else (),
    )


def _mask_error(reference: Detections, candidate: Detections, possible: np.ndarray) -> np.ndarray:
    """Mean absolute difference of the masks of every possible pair, (A, B); 0 elsewhere and without masks."""
    error = np.zeros(possible.shape)
    if (reference.masks is None) != (candidate.masks is None):
        raise ValueError("detections with masks cannot be matched with detections without")
    if reference.masks is not None and candidate.masks is not None:
        i, j = np.nonzero(possible)
        error[i, j] = np.abs(reference.masks[i] - candidate.masks[j]).mean(axis=(1, 2))
    return error


def combined(results: Iterable[MatchResult]) -> MatchResult:
    """One result over many images, in order."""
    total = MatchResult()
    for result in results:
        total = MatchResult(
            num_images=total.num_images + result.num_images,
            num_matched=total.num_matched + result.num_matched,
            num_unmatched=total.num_unmatched + result.num_unmatched,
            num_tolerated=total.num_tolerated + result.num_tolerated,
            num_tied=total.num_tied + result.num_tied,
            min_iou=min(total.min_iou, result.min_iou),
            max_score_error=max(total.max_score_error, result.max_score_error),
            max_box_error_pixels=max(total.max_box_error_pixels, result.max_box_error_pixels),
            max_mask_error=max(total.max_mask_error, result.max_mask_error),
            unmatched_images=total.unmatched_images + tuple(total.num_images + i for i in result.unmatched_images),
        )
    return total


def batch_invariance(
    runner: Runner, images: Sequence[np.ndarray], *, score_floor: float = 0.3, seed: int = 0
) -> BatchInvariance:
    """Run the same images alone, in batches of 2, 3 and the largest size, and shuffled in batches of the largest size.

    Every arrangement has a full batch and ends with a ragged one: where the images are too few, or too even in number,
    they are taken from the start again.

    Args:
        runner: whatever runs the detector.
        images: uint8 (3, H, W) canvases, at least one.
        score_floor: detections above it must have a partner (same class, IoU >= 0.999 or within 0.01 px, score within
            1e-3) in every arrangement.
        seed: of the shuffle.
    """
    signature = runner.signature
    alone = _detections(runner, images, 1)
    shuffled = np.random.default_rng(seed).permutation(len(images)).tolist()
    in_order = list(range(len(images)))
    largest = signature.max_batch_size
    arrangements = [
        (f"batches of {size}", in_order, size) for size in sorted({min(2, largest), min(3, largest), largest})
    ]
    arrangements.append((f"shuffled, batches of {largest}", shuffled, largest))
    failed, num_unmatched, sizes = [], 0, {1}
    for name, given, size in arrangements:
        order = _with_a_ragged_end(given, size)
        try:
            batched = _detections(runner, [images[i] for i in order], size)
        except RunFailed as error:
            num_unmatched += max(1, sum(len(alone[i].above(score_floor)) for i in order))
            failed.append(f"{name}: {error}")
            continue
        sizes |= {min(size, len(order) - start) for start in range(0, len(order), size)}
        count = sum(
            match_detections(
                alone[i],
                found,
                score_threshold=signature.score_threshold,
                max_detections=signature.max_detections,
                score_floor=score_floor,
            ).num_unmatched
            for i, found in zip(order, batched, strict=True)
        )
        num_unmatched += count
        failed += [name] if count else []
    return BatchInvariance(
        num_images=len(images),
        batch_sizes=tuple(sorted(sizes)),
        num_unmatched=num_unmatched,
        score_floor=score_floor,
        failed=tuple(failed),
    )


def _with_a_ragged_end(order: list[int], size: int) -> list[int]:
    """The order, from its start again until a full batch and a smaller one come out; there is none smaller than 1."""
    length = max(len(order), size + 1)
    length += size > 1 and length % size == 0
    return [order[i % len(order)] for i in range(length)]


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of (A, 4) with (B, 4) boxes, (A, B); 0 where both areas are zero."""
    a, b = a.astype(np.float64)[:, None], b.astype(np.float64)[None, :]
    edges = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = edges.clip(min=0).prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def _detections(runner: Runner, images: Sequence[np.ndarray], batch_size: int) -> list[Detections]:
    return [
        found
        for start in range(0, len(images), batch_size)
        for found in runner.run(np.stack(images[start : start + batch_size]))
    ]
