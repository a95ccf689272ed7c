from __future__ import annotations

import pytest
import torch
from location_cases import distances_of

from training.detectors.edges import EdgeDistributions, EdgeRegression, edges_of


@pytest.mark.parametrize("reg_max", [None, 1, 7, 16])
def test_distances_are_those_of_a_loop_over_edges_and_steps(reg_max: int | None) -> None:
    edges = edges_of(reg_max)
    torch.manual_seed(0)
    values = torch.randn(2, 3, 5, 4 * edges.values_per_edge) * 3
    found = edges.distances(values)
    assert found.shape == (2, 3, 5, 4)
    for row, expected in zip(found.reshape(-1, 4), values.reshape(-1, values.shape[-1]), strict=True):
        assert row.tolist() == pytest.approx(distances_of(expected.tolist()), rel=1e-5)


def test_a_distribution_of_one_step_is_that_distance_and_of_all_steps_alike_their_mean() -> None:
    edges = EdgeDistributions(reg_max=16)
    for step in range(17):
        logits = torch.full((4, 17), -1e4)
        logits[:, step] = 0
        assert edges.distances(logits.flatten()).tolist() == [step] * 4
    assert edges.distances(torch.full((68,), 3.0)).tolist() == pytest.approx([8.0] * 4)


def test_adding_a_constant_to_an_edges_logits_changes_no_distance() -> None:
    edges, values = EdgeDistributions(reg_max=5), torch.randn(10, 24)
    shifted = (edges.logits(values) + torch.randn(10, 4, 1)).flatten(1)
    torch.testing.assert_close(edges.distances(shifted), edges.distances(values))


def test_distances_lie_between_zero_and_reg_max_and_are_float32_for_large_logits_in_half_precision() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        found = EdgeDistributions(reg_max=16).distances((torch.randn(50, 68) * 1e4).to(dtype))
        assert found.dtype == torch.float32
        assert 0 <= found.min() <= found.max() <= 16
        assert EdgeRegression().distances(torch.randn(50, 4).to(dtype)).dtype == torch.float32
