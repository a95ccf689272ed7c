"""What holds for LGD whatever its weights are: symmetries, gradient paths, bounds, and inputs that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from training.distillers.lgd.distiller import LabelGuidedDistiller, LgdConfig
from training.distillers.lgd.objects import LgdInputError, objects_from_instances

SIZE = (128, 96)
LEVELS = {"p3": (16, 12), "p4": (8, 6), "p5": (4, 3)}
CHANNELS, NUM_CLASSES = 16, 4
BOXES = [[4.0, 8.0, 60.0, 70.0], [30.0, 20.0, 90.0, 120.0], [50.0, 60.0, 58.0, 68.0]]
CLASSES = [1, 3, 0]
Labels = Callable[..., Instances]


def _build(**changes: Any) -> LabelGuidedDistiller:
    torch.manual_seed(0)
    return LgdConfig(**changes).build(channels=CHANNELS, num_classes=NUM_CLASSES, level_names=list(LEVELS))


def _features(num_images: int = 1, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        level: torch.randn(num_images, CHANNELS, *size, generator=generator).requires_grad_()
        for level, size in LEVELS.items()
    }


def _teacher_loss(features: dict[str, Tensor], trains_head: bool) -> dict[str, Tensor]:
    """A stand-in of the student's head: smooth, asymmetric, different at every level."""
    return {
        "loss_cls": sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).mean() for x in features.values()),
        "loss_box_reg": sum((x**3).mean() for x in features.values()),
    }


def _losses(
    distiller: LabelGuidedDistiller, features: dict[str, Tensor], gt: list[Instances], *, distill: bool = True
) -> dict[str, Tensor]:
    return distiller(
        features=features, gt_instances=gt, padded_size=SIZE, distill=distill, teacher_losses=_teacher_loss
    )


def _gradients(loss: Tensor, inputs: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(inputs), retain_graph=True, materialize_grads=True))


def _any(gradients: list[Tensor]) -> bool:
    return any(bool(gradient.any()) for gradient in gradients)


def test_the_parts_have_the_parameters_of_the_paper() -> None:
    def count(part: nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    distiller = LgdConfig().build(channels=256, num_classes=80, level_names=["p3"])
    assert count(distiller.implicit_teacher) == 8_304_336
    assert count(distiller.implicit_teacher.label_encoder) == 4_893_392
    assert count(distiller.adapter) == 1_770_240
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"implicit_teacher", "adapter"}


def test_the_losses_are_the_distillation_loss_and_the_suffixed_losses_on_the_teachers_features(labels: Labels) -> None:
    distiller, features, gt = _build(), _features(), [labels(BOXES, CLASSES)]
    losses = _losses(distiller, features, gt)
    teacher = distiller.teacher_features(features, gt, SIZE)

    assert list(losses) == ["loss_distill", "loss_cls.tea", "loss_box_reg.tea"]
    assert losses["loss_cls.tea"] == _teacher_loss(teacher, True)["loss_cls"]
    assert losses["loss_distill"] == distiller.distillation_loss(features, teacher, distill=True)


def test_the_loss_weight_scales_the_distillation_loss(labels: Labels) -> None:
    features, gt = _features(), [labels(BOXES, CLASSES)]
    plain = _losses(_build(), features, gt)["loss_distill"]
    torch.testing.assert_close(_losses(_build(loss_weight=2.5), features, gt)["loss_distill"], 2.5 * plain)


@pytest.mark.parametrize("context_object", [True, False])
@pytest.mark.parametrize("query", ["appearance", "label"])
def test_the_order_of_the_objects_does_not_matter(labels: Labels, context_object: bool, query: str) -> None:
    distiller, features = _build(context_object=context_object, query=query), _features()
    order = [2, 0, 1]
    shuffled = labels([BOXES[i] for i in order], [CLASSES[i] for i in order])
    first = _losses(distiller, features, [labels(BOXES, CLASSES)])
    second = _losses(distiller, features, [shuffled])
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_label_embeddings_follow_the_order_of_the_objects_and_the_context_stays_last(labels: Labels) -> None:
    def embeddings(order: list[int]) -> Tensor:
        gt = labels([BOXES[i] for i in order], [CLASSES[i] for i in order])
        objects = objects_from_instances(
            [gt], SIZE, num_classes=NUM_CLASSES, context_object=True, device=torch.device("cpu")
        )
        return _build().implicit_teacher.label_encoder(objects)[0]

    torch.testing.assert_close(embeddings([0, 1, 2])[[2, 0, 1, 3]], embeddings([2, 0, 1]))


@pytest.mark.parametrize("context_object", [True, False])
def test_a_batch_equals_its_images_one_by_one_at_the_same_padded_size(labels: Labels, context_object: bool) -> None:
    distiller, features = _build(context_object=context_object), _features(num_images=3)
    gt = [labels(BOXES, CLASSES), labels([], []), labels(BOXES[:1], CLASSES[:1])]
    together = distiller.teacher_features(features, gt, SIZE)
    loss = distiller.distillation_loss(features, together, distill=True)

    losses = []
    for index in range(3):
        single = {level: feature[index : index + 1] for level, feature in features.items()}
        alone = distiller.teacher_features(single, gt[index : index + 1], SIZE)
        losses.append(distiller.distillation_loss(single, alone, distill=True))
        for level in LEVELS:
            torch.testing.assert_close(together[level][index : index + 1], alone[level], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_a_single_object_without_context_makes_the_teacher_independent_of_the_student(labels: Labels) -> None:
    distiller, gt = _build(context_object=False), [labels(BOXES[:1], CLASSES[:1])]
    features = _features(seed=1)
    first, second = (distiller.teacher_features(f, gt, SIZE) for f in (features, _features(seed=2)))
    for level in LEVELS:
        assert torch.equal(first[level], second[level])
    assert not _any(_gradients(_teacher_loss(first, True)["loss_cls"], features.values()))


def test_the_teachers_loss_reaches_the_student_through_the_appearance(labels: Labels) -> None:
    features = _features()
    loss = _losses(_build(), features, [labels(BOXES[:1], CLASSES[:1])])["loss_cls.tea"]
    assert all(gradient.any() for gradient in _gradients(loss, features.values()))


def test_detached_appearance_stops_the_teachers_loss_but_still_trains_the_projection(labels: Labels) -> None:
    distiller, features = _build(detach_appearance=True), _features()
    loss = _losses(distiller, features, [labels(BOXES, CLASSES)])["loss_cls.tea"]
    projection = distiller.implicit_teacher.appearance_encoder.parameters()
    *by_features, by_projection, _ = _gradients(loss, [*features.values(), *projection])
    assert not _any(by_features)
    assert by_projection.any()


@pytest.mark.parametrize("distill", [True, False])
def test_distillation_off_trains_the_adapter_only_and_never_the_teacher(labels: Labels, distill: bool) -> None:
    distiller, features = _build(), _features()
    loss = _losses(distiller, features, [labels(BOXES, CLASSES)], distill=distill)["loss_distill"]
    on = _losses(distiller, features, [labels(BOXES, CLASSES)], distill=True)["loss_distill"]

    assert torch.equal(loss, on), "the value is the same on or off"
    assert not _any(_gradients(loss, distiller.implicit_teacher.parameters()))
    assert _any(_gradients(loss, distiller.adapter.parameters()))
    assert _any(_gradients(loss, features.values())) is distill


def test_the_teachers_features_have_mean_zero_and_variance_one_in_every_sample(labels: Labels) -> None:
    teacher = _build().teacher_features(_features(2), [labels(BOXES, CLASSES), labels([], [])], SIZE)
    for features in teacher.values():
        samples = features.flatten(1)
        torch.testing.assert_close(samples.mean(1), torch.zeros(2), rtol=0, atol=1e-5)
        torch.testing.assert_close(samples.var(1, unbiased=False), torch.ones(2), rtol=1e-2, atol=0)


def test_the_distillation_loss_is_two_minus_twice_the_correlation_within_zero_and_four() -> None:
    distiller, features, other = _build(), _features(seed=3), _features(seed=4)
    distiller.adapter = nn.Identity()
    opposite = {level: -feature for level, feature in features.items()}
    affine = {level: 3.0 * feature + 5.0 for level, feature in features.items()}

    def loss(teacher: dict[str, Tensor]) -> float:
        return distiller.distillation_loss(features, teacher, distill=True).item()

    assert loss(affine) == pytest.approx(0, abs=1e-8)
    assert loss(opposite) == pytest.approx(4, rel=1e-3)
    planes = [
        2 * (1 - torch.corrcoef(torch.stack((ours.flatten(), theirs.flatten())))[0, 1])
        for level in LEVELS
        for ours, theirs in zip(features[level][0], other[level][0], strict=True)
        for _ in range(ours.numel())
    ]
    assert loss(other) == pytest.approx(torch.stack(planes).mean().item(), rel=1e-3)


def test_a_changed_class_changes_the_teacher_and_swapped_classes_of_equal_boxes_do_not(labels: Labels) -> None:
    distiller, features = _build(), _features()

    def teacher(classes: list[int]) -> Tensor:
        return distiller.teacher_features(features, [labels([BOXES[0], BOXES[0]], classes)], SIZE)["p3"]

    torch.testing.assert_close(teacher([1, 2]), teacher([2, 1]))
    assert (teacher([1, 2]) - teacher([1, 3])).abs().max() > 1e-3


DEGENERATE = {
    "no objects in any image": [[], []],
    "no objects in one image": [[], BOXES],
    "only tiny objects": [[[50.1, 60.1, 51.0, 61.0]] * 2, [[1.2, 1.2, 1.9, 1.9]]],
    "a box without area": [[[30.0, 30.0, 30.0, 30.0], [10.0, 20.0, 10.0, 60.0]], BOXES],
    "boxes at the borders": [[[60.0, 80.0, 96.0, 128.0]], [[0.0, 0.0, 96.0, 128.0]]],
}


@pytest.mark.parametrize("context_object", [True, False])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_labels_give_finite_losses_and_a_gradient_for_every_parameter(
    labels: Labels, case: str, context_object: bool
) -> None:
    distiller, features = _build(context_object=context_object), _features(2)
    losses = _losses(distiller, features, [labels(b, [0] * len(b)) for b in DEGENERATE[case]])
    torch.stack(list(losses.values())).sum().backward()

    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in [*distiller.named_parameters(), *features.items()]:
        assert parameter.grad is not None, f"{name} would be unused under DistributedDataParallel"
        assert parameter.grad.isfinite().all(), name


def test_a_level_of_a_single_cell_is_finite(labels: Labels) -> None:
    distiller = LgdConfig().build(channels=CHANNELS, num_classes=NUM_CLASSES, level_names=["p7"])
    features = {"p7": torch.randn(1, CHANNELS, 1, 1, requires_grad=True)}
    losses = _losses(distiller, features, [labels(BOXES, CLASSES)])
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert features["p7"].grad.isfinite().all()


def test_bfloat16_autocast_stays_within_two_percent_of_float32(labels: Labels) -> None:
    distiller, features, gt = _build(), _features(2), [labels(BOXES, CLASSES), labels([], [])]
    exact = _losses(distiller, features, gt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = {level: feature.bfloat16() for level, feature in features.items()}
        rounded = _losses(distiller, narrow, gt)
        teacher = distiller.teacher_features(narrow, gt, SIZE)
    assert rounded["loss_distill"].dtype == torch.float32
    assert {feature.dtype for feature in teacher.values()} == {torch.float32}
    assert sum(rounded.values()).item() == pytest.approx(sum(exact.values()).item(), rel=0.02)


@pytest.mark.parametrize(
    ("levels", "channels", "found"),
    [
        (("p3", "p4"), CHANNELS, "found p3 of 16, p4 of 16"),
        (("p2", "p3", "p4", "p5"), CHANNELS, "found p2 of 16"),
        (("p3", "p4", "p5"), 8, "found p3 of 8, p4 of 8, p5 of 8"),
    ],
)
def test_another_pyramid_is_refused_naming_both(
    labels: Labels, levels: tuple[str, ...], channels: int, found: str
) -> None:
    features = {level: torch.zeros(1, channels, 4, 4) for level in levels}
    with pytest.raises(LgdInputError, match=rf"expected levels p3, p4, p5 of 16 channels, {found}"):
        _losses(_build(), features, [labels(BOXES, CLASSES)])


def test_recipes_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(LgdInputError, match=r"distiller\.query is 'labels'.*appearance, label"):
        LgdConfig(query="labels")
    with pytest.raises(LgdInputError, match=r"num_heads is 8.*30 channels"):
        LgdConfig().build(channels=30, num_classes=3, level_names=["p3"])
    with pytest.raises(LgdInputError, match="no level"):
        LgdConfig().build(channels=32, num_classes=3, level_names=[])


def test_the_teacher_overfits_labels_that_the_student_cannot_see(labels: Labels) -> None:
    """The teacher is told the labels: from constant features it must learn to tell objects' cells from the rest."""
    distiller = _build()
    features = {level: torch.ones(2, CHANNELS, *size) for level, size in LEVELS.items()}
    gt = [labels(BOXES[:1], [0]), labels(BOXES[1:2], [1])]
    target = torch.zeros(2, *LEVELS["p3"])
    target[0, 1:9, 1:8] = 1
    target[1, 3:15, 4:12] = 1
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)

    losses = []
    for _ in range(40):
        prediction = distiller.teacher_features(features, gt, SIZE)["p3"][:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(3 * prediction, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
