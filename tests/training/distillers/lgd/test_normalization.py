"""Normalisations without parameters."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from training.distillers.lgd.normalization import normalize_planes, normalize_samples, normalize_vectors


def test_plane_normalisation_equals_instance_norm_and_its_gradient() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    ours, theirs = normalize_planes(x), F.instance_norm(x)

    torch.testing.assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad((ours * weight).sum(), x)
    (expected,) = torch.autograd.grad((theirs * weight).sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_a_plane_of_one_cell_becomes_zero_with_zero_gradient() -> None:
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    normalised = normalize_planes(x)
    normalised.sum().backward()
    assert not normalised.any()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("normalize", [normalize_planes, normalize_samples, normalize_vectors])
def test_half_precision_is_widened_and_double_precision_kept(normalize: object) -> None:
    x = torch.randn(2, 8, 4, 4)
    assert normalize(x.bfloat16()).dtype == torch.float32
    assert normalize(x.double()).dtype == torch.float64
