from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import build_tiny_retinanet
from torch import nn

from training.config import OptimizerConfig, TrainingConfig
from training.distilled_detector import DistilledDetector
from training.distillers import LgdConfig, NoDistillerConfig
from training.optimization import LearningRateHook, Optimizers, build_optimizers, learning_rate_factor
from training.train import distilled_detector

LGD = LgdConfig(distill_from_iter=1, freeze_backbone_until_iter=0, num_heads=4)
SGD_OF_THE_TEACHER = OptimizerConfig(optimizer="sgd", learning_rate=0.02, weight_decay=1e-4)


def config(**changes: object) -> TrainingConfig:
    values: dict = {
        "max_iter": 100,
        "images_per_batch": 2,
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "weight_decay": 0.05,
        "warmup_iters": 0,
        "short_edge_pixels": (96,),
        "max_edge_pixels": 128,
    }
    return TrainingConfig(**{**values, **changes})


def module() -> DistilledDetector:
    return distilled_detector(build_tiny_retinanet(), LGD).train()


def parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def ids(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters() if p.requires_grad}


def test_the_teacher_has_the_students_optimizer_unless_the_recipe_gives_it_its_own() -> None:
    detector = module()
    optimizers = build_optimizers(detector, config())
    assert list(optimizers.by_owner) == ["student"]
    assert parameters_of(optimizers.by_owner["student"]) == ids(detector)


def test_a_teacher_optimizer_trains_the_implicit_teacher_and_the_adapter_stays_with_the_student() -> None:
    detector = module()
    optimizers = build_optimizers(detector, config(teacher_optimizer=SGD_OF_THE_TEACHER))
    student, teacher = optimizers.by_owner["student"], optimizers.by_owner["teacher"]
    assert isinstance(student, torch.optim.AdamW)
    assert isinstance(teacher, torch.optim.SGD)
    assert parameters_of(teacher) == ids(detector.distiller.implicit_teacher)
    assert parameters_of(student) == ids(detector.student) | ids(detector.distiller.adapter)
    assert (teacher.param_groups[0]["lr"], teacher.param_groups[0]["weight_decay"]) == (0.02, 1e-4)
    assert (student.param_groups[0]["lr"], student.param_groups[0]["weight_decay"]) == (1e-4, 0.05)


def test_a_plain_student_has_no_teacher_to_optimize() -> None:
    detector = distilled_detector(build_tiny_retinanet(), NoDistillerConfig())
    optimizers = build_optimizers(detector, config(teacher_optimizer=SGD_OF_THE_TEACHER))
    assert list(optimizers.by_owner) == ["student"]


@pytest.mark.parametrize("teacher_optimizer", [None, SGD_OF_THE_TEACHER])
def test_every_optimizer_clips_each_gradient_element_and_steps(teacher_optimizer: OptimizerConfig | None) -> None:
    detector = module()
    changes: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.0}
    if teacher_optimizer is not None:
        changes["teacher_optimizer"] = OptimizerConfig(learning_rate=0.25, weight_decay=0.0)
    optimizers = build_optimizers(detector, config(**changes))
    parts = {
        detector.student.head.cls_score.bias: 0.5,
        next(iter(detector.distiller.adapter.parameters())): 0.5,
        next(iter(detector.distiller.implicit_teacher.parameters())): 0.25 if teacher_optimizer else 0.5,
    }
    before = {parameter: parameter.detach().clone() for parameter in parts}
    for parameter in parts:
        parameter.grad = torch.full_like(parameter, 7.0)
    optimizers.step()
    for parameter, rate in parts.items():
        torch.testing.assert_close(before[parameter] - parameter.detach(), torch.full_like(parameter, rate))
    optimizers.zero_grad()
    assert all(parameter.grad is None for parameter in parts)


def test_the_state_of_both_optimizers_is_saved_and_restored() -> None:
    settings = config(teacher_optimizer=SGD_OF_THE_TEACHER)
    detector = module()
    optimizers = build_optimizers(detector, settings)
    for parameter in detector.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    restored = build_optimizers(module(), settings)
    restored.load_state_dict(optimizers.state_dict())
    adam, sgd = restored.state_dict()["student"]["state"], restored.state_dict()["teacher"]["state"]
    assert float(adam[0]["exp_avg"].flatten()[0]) == pytest.approx(0.1)
    assert float(sgd[0]["momentum_buffer"].flatten()[0]) == pytest.approx(1.0, abs=1e-3)


def test_both_learning_rates_follow_the_schedule_of_the_iteration_alone() -> None:
    settings = config(lr_schedule="multistep", lr_decay_iters=(60,), teacher_optimizer=SGD_OF_THE_TEACHER)
    optimizers = build_optimizers(module(), settings)
    hook = LearningRateHook(optimizers, settings)
    logged: dict[str, float] = {}
    storage = type("Storage", (), {"put_scalar": lambda _, name, value, **__: logged.update({name: value})})()
    for iteration, factor in ((0, 1.0), (80, 0.1), (10, 1.0)):
        hook.trainer = type("Trainer", (), {"iter": iteration, "storage": storage})()
        hook.before_step()
        rates = [group["lr"] for group in optimizers.param_groups]
        assert rates == pytest.approx([1e-4 * factor, 0.02 * factor])
        assert logged["lr"] == pytest.approx(1e-4 * factor)


def test_several_optimizers_look_like_one_to_a_gradient_scaler() -> None:
    weights = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    optimizers = Optimizers({str(i): torch.optim.SGD([weight], 1.0) for i, weight in enumerate(weights)})
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(weights[0] * 0.5 + weights[1] * 0.25).sum().backward()
    scaler.step(optimizers)
    assert [weight.item() for weight in weights] == [0.5, 0.75]
    for weight in weights:
        weight.grad = torch.full_like(weight, torch.inf)
    scaler.update()
    scaler.step(optimizers)
    assert [weight.item() for weight in weights] == [0.5, 0.75], "a step with infinite gradients is left out"


def test_warm_up_leads_into_the_schedule() -> None:
    cosine = learning_rate_factor(config(lr_schedule="cosine", warmup_iters=10))
    assert cosine(0.0) == pytest.approx(1e-3)
    assert cosine(0.05) == pytest.approx(0.5, abs=0.02)
    assert cosine(0.1) == pytest.approx(0.975, abs=0.01)
    assert cosine(0.999) < 1e-3
    steps = learning_rate_factor(config(lr_schedule="multistep", lr_decay_iters=(60, 80), warmup_iters=0))
    assert [steps(x) for x in (0.0, 0.59, 0.61, 0.81)] == pytest.approx([1, 1, 0.1, 0.01])
