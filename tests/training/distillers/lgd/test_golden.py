"""The implicit teacher against vectors recorded from the authors' code: values and gradients, to 1e-4 of each maximum.

The compact vectors (tests/golden/lgd, made by tests/golden/make_lgd.py) are in the repository; the full recording is
compared too where it lies beside the checkout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from training.distillers.lgd.distiller import LgdConfig

COMPACT = Path(__file__).parents[3] / "golden" / "lgd"
FULL = Path(__file__).parents[5] / "shared" / "golden" / "lgd"
RELATIVE_TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["context", "no_context"])
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[torch.contiguous_format, torch.channels_last], ids=str)
def memory_format(request: pytest.FixtureRequest) -> torch.memory_format:
    """Training's is channels-last."""
    return request.param


@pytest.fixture(scope="module")
def computed(
    case: str, memory_format: torch.memory_format, fill_by_rule: Callable, labels: Callable
) -> dict[str, np.ndarray]:
    """Every recorded array, computed by this project from the same parameters, labels and features."""
    with np.load(COMPACT / f"{case}.npz") as golden:
        size = (int(golden["size"][0]), int(golden["size"][1]))
        gt_instances = [labels(golden[f"boxes_{i}"], golden[f"classes_{i}"], size) for i in range(2)]
        stream = np.random.RandomState(int(golden["seed"]))
        features = {
            level: torch.from_numpy(stream.standard_normal(golden[f"student_{level}/shape"]).astype(np.float32))
            for level in ("p3", "p4", "p5", "p6", "p7")
        }
    has_context = case == "context"
    config = LgdConfig(context_object=has_context, detach_appearance=not has_context)
    distiller = config.build(channels=256, num_classes=80, level_names=list(features))
    fill_by_rule(distiller)
    distiller.to(memory_format=memory_format)
    embeddings = []
    distiller.implicit_teacher.label_encoder.register_forward_hook(
        lambda _, inputs, output: embeddings.append(output[inputs[0].is_object])
    )

    features = {level: x.contiguous(memory_format=memory_format).requires_grad_() for level, x in features.items()}
    teacher = distiller.teacher_features(features, gt_instances, size)
    loss = distiller.distillation_loss(features, teacher, distill=True)
    inputs = list(features.values())
    by_loss = torch.autograd.grad(loss, inputs)
    functional = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() / t.numel() for t in teacher.values())
    by_functional = torch.autograd.grad(functional, inputs, allow_unused=True, materialize_grads=True)

    results = {"label_embeddings": embeddings[0], "distillation_loss": loss}
    for level, grad_loss, grad_functional in zip(features, by_loss, by_functional, strict=True):
        results[f"teacher_{level}"] = teacher[level]
        results[f"grad_distillation_{level}"] = grad_loss
        results[f"grad_teacher_functional_{level}"] = grad_functional
        results[f"student_{level}"] = features[level]
    return {name: result.detach().numpy() for name, result in results.items()}


def test_the_compact_golden_vectors_are_matched_in_every_array(case: str, computed: dict[str, np.ndarray]) -> None:
    with np.load(COMPACT / f"{case}.npz") as golden:
        names = {name.split("/")[0] for name in golden.files if name.endswith("/value")}
        assert len(names) == 17
        for name in names:
            array, value = computed[name], golden[f"{name}/value"]
            largest = np.abs(value).max()  # of the whole array: its largest entry is always in the sample
            if largest == 0:
                assert not array.any(), f"{name} must be exactly zero"
                continue
            difference = np.abs(array.ravel()[golden[f"{name}/index"]] - value).max()
            assert difference <= RELATIVE_TOLERANCE * largest, f"{name}: {difference / largest:.2e}"
            assert np.abs(array).max() == pytest.approx(largest, rel=RELATIVE_TOLERANCE, abs=0), name
            if array.ndim == 4:
                sums = array.sum(axis=(2, 3), dtype=np.float64)
                difference = np.abs(sums - golden[f"{name}/plane_sums"]).max()
                assert difference <= RELATIVE_TOLERANCE * golden[f"{name}/largest_plane"], f"{name}: plane sums"


@pytest.mark.skipif(not FULL.is_dir(), reason="the full recording is not beside this checkout (../shared/golden/lgd)")
def test_the_full_recording_is_matched_in_every_array(case: str, computed: dict[str, np.ndarray]) -> None:
    with np.load(FULL / f"reference_{case}.npz") as recorded:
        names = [name for name in recorded.files if name != "size" and not name.startswith(("boxes_", "classes_"))]
        assert set(names) == set(computed)
        for name in names:
            assert computed[name].shape == recorded[name].shape, name
            largest = np.abs(recorded[name]).max()
            difference = np.abs(computed[name] - recorded[name]).max()
            assert difference <= RELATIVE_TOLERANCE * largest, f"{name}: {difference} of {largest}"


@pytest.mark.skipif(not FULL.is_dir(), reason="the full recording is not beside this checkout (../shared/golden/lgd)")
def test_every_parameter_is_one_of_the_reference(reference_name: Callable[[str], str]) -> None:
    recorded = json.loads((FULL / "parameters.json").read_text())
    shapes = {name: tuple(shape) for group in recorded.values() for name, shape in group.items()}
    distiller: nn.Module = LgdConfig().build(channels=256, num_classes=80, level_names=["p3"])
    ours = {reference_name(name): tuple(parameter.shape) for name, parameter in distiller.named_parameters()}
    # The reference writes linear layers of the label encoder as convolutions of kernel 1.
    assert ours == {name: shape[:-1] if len(shape) == 3 else shape for name, shape in shapes.items()}
