"""Prove a live endpoint: golden images, AP one request at a time and in mixed batches, and that the two agree."""

from __future__ import annotations

import dataclasses
from typing import Any

from export.ladder import Floor, Rung
from export.parity import MatchResult, combined, match_detections
from export.signature import Detections, DetectorSignature
from pipeline.accuracy import Ladder
from pipeline.endpoint import runner_of
from pipeline.model_files import ModelFile, runner_in_process
from pipeline.stage import Gate, StageContext
from serving.client import run_concurrently
from serving.config import ServingConfig

CONCURRENCY = 8
ONE_BY_ONE = "Triton, concurrency 1"
BATCHED = f"Triton, concurrency {CONCURRENCY}"
NUM_GOLDEN_IMAGES = 20


def prove(
    context: StageContext, ladder: Ladder, url: str, served: ModelFile, config: ServingConfig, compared_with: str
) -> dict[str, Any]:
    """Add the endpoint's rungs and gates to ``ladder``; what was found is returned.

    Args:
        url: host:port of the gRPC endpoint.
        served: the file behind it.
        config: how it is served.
        compared_with: the rung that ran the same model in process, in ``ladder`` already.
    """
    limits = context.recipe.sections["parity"]
    with runner_of(config, url) as runner:
        alone = [runner.run(canvas[None])[0] for canvas in ladder.canvases()]
        with runner_in_process(served, runner.signature, config) as in_process:
            golden = [in_process.run(canvas[None])[0] for canvas in ladder.canvases(NUM_GOLDEN_IMAGES)]
        before = runner.statistics()
        mixed = run_concurrently(
            url,
            config.model_name,
            ladder.canvases(),
            concurrency=CONCURRENCY,
            timeout_seconds=config.request_timeout_seconds,
        )
        batching = runner.statistics() - before
        signature = runner.signature
    floor = Floor(points=limits.max_ap_drop_served)
    rung = Rung(name=ONE_BY_ONE, compared_with=compared_with, floors={compared_with: floor})
    ladder.add(rung, alone, served.path)
    matched = _matched(golden, alone[: len(golden)], signature, score_floor=0.0)
    ladder.hold(
        ONE_BY_ONE,
        Gate(
            name="golden images through the endpoint: detections without a partner",
            value=matched.num_unmatched,
            limit=0,
            passed=matched.num_unmatched == 0,
            reason=f"{matched.num_matched} detections on {matched.num_images} images, against the same file in process",
        ),
    )
    batches = f"{batching.num_requests} requests in {batching.num_executions} executions"
    if batching.num_executions >= batching.num_requests:
        batches += ": the server put none together, so only requests of several images show what a batch does"
    rung = Rung(name=BATCHED, compared_with=ONE_BY_ONE, floors={ONE_BY_ONE: floor})
    ladder.add(rung, mixed, served.path, note=batches)
    invariant = _matched(alone, mixed, signature, score_floor=limits.min_matched_score)
    ladder.hold(
        BATCHED,
        Gate(
            name="batch invariance, Triton: detections that change in mixed batches",
            value=invariant.num_unmatched,
            limit=0,
            passed=invariant.num_unmatched == 0,
            reason=f"above score {limits.min_matched_score}; mean batch {batching.mean_batch_size:.2f}",
        ),
    )
    return {
        **ladder.facts(),
        "golden_images": {"num": matched.num_images, "num_unmatched": matched.num_unmatched},
        "batch_invariance": dataclasses.asdict(invariant),
        "mean_batch_size": batching.mean_batch_size,
        "concurrency": CONCURRENCY,
    }


def _matched(
    reference: list[Detections], candidate: list[Detections], signature: DetectorSignature, *, score_floor: float
) -> MatchResult:
    return combined(
        match_detections(
            a,
            b,
            score_threshold=signature.score_threshold,
            max_detections=signature.max_detections,
            score_floor=score_floor,
        )
        for a, b in zip(reference, candidate, strict=True)
    )
