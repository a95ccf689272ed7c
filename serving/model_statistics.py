"""What a Triton server counted for one model, as a dataclass that can be subtracted."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelStatistics:
    """Cumulative counters since the model was loaded, summed over its served versions.

    Attributes:
        num_requests: requests answered.
        num_failures: requests that ended in an error.
        num_images: images inferred (a request of batch 3 counts 3).
        num_executions: model executions; fewer than images where batching worked.
        queue_seconds: time requests waited.
        compute_input_seconds, compute_infer_seconds, compute_output_seconds: time requests spent in copying in,
            inference and copying out. A batch's time counts once for each request in it, as in NVIDIA's perf_analyzer.
    """

    num_requests: int
    num_failures: int
    num_images: int
    num_executions: int
    queue_seconds: float
    compute_input_seconds: float
    compute_infer_seconds: float
    compute_output_seconds: float

    @classmethod
    def from_answer(cls, answer: Any) -> ModelStatistics:
        """From Triton's ``ModelStatisticsResponse``."""
        stats = answer.model_stats
        return cls(
            num_requests=sum(s.inference_stats.success.count for s in stats),
            num_failures=sum(s.inference_stats.fail.count for s in stats),
            num_images=sum(s.inference_count for s in stats),
            num_executions=sum(s.execution_count for s in stats),
            queue_seconds=sum(s.inference_stats.queue.ns for s in stats) / 1e9,
            compute_input_seconds=sum(s.inference_stats.compute_input.ns for s in stats) / 1e9,
            compute_infer_seconds=sum(s.inference_stats.compute_infer.ns for s in stats) / 1e9,
            compute_output_seconds=sum(s.inference_stats.compute_output.ns for s in stats) / 1e9,
        )

    def __sub__(self, earlier: ModelStatistics) -> ModelStatistics:
        names = [field.name for field in dataclasses.fields(self)]
        return ModelStatistics(**{name: getattr(self, name) - getattr(earlier, name) for name in names})

    @property
    def mean_batch_size(self) -> float:
        """Images an execution; 0 when nothing was executed."""
        return self.num_images / self.num_executions if self.num_executions else 0.0

    def milliseconds_per_request(self) -> dict[str, float]:
        """Mean ``queue_ms``, ``compute_input_ms``, ``compute_infer_ms`` and ``compute_output_ms`` of a request."""
        parts = ("queue", "compute_input", "compute_infer", "compute_output")
        count = max(self.num_requests, 1)
        return {f"{part}_ms": 1e3 * getattr(self, f"{part}_seconds") / count for part in parts}
