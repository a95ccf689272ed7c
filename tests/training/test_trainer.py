"""What an iteration does: precision, divergence, averages, compiled parts."""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_retinanet
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils.events import EventStorage
from torch import nn

from tests.training.training_runs import LGD, NUM_CLASSES, coco_of_equal_images, config, differing, final, run
from training.acceleration import CompilerMissing, check_compiler, compile_student, keep_predictions_in_float32
from training.checkpoint import StudentCheckpointer, read_checkpoint
from training.dataset import CocoDataset
from training.distilled_detector import on_device
from training.distillers import LgdConfig, NoDistillerConfig
from training.divergence import LossNotFinite, LossRecord, names_not_finite
from training.loader import training_loader
from training.train import distilled_detector
from training.weight_average import AverageHook


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return coco_of_equal_images(tmp_path_factory.mktemp("equal"), size=(64, 96))


def narrow() -> RetinaNet:
    return build_tiny_retinanet(num_classes=NUM_CLASSES, channels=16)


def batches(dataset: CocoDataset, number: int) -> list[list[dict[str, Any]]]:
    loader = iter(training_loader(narrow(), config(), dataset, start_iter=0))
    return [next(loader) for _ in range(number)]


# precision


def test_under_bf16_the_total_loss_of_lgd_stays_within_two_percent_over_twenty_steps(dataset: CocoDataset) -> None:
    """From the same weights, on the same batches; each precision trains its own copy."""
    distiller = LgdConfig(distill_from_iter=5, freeze_backbone_until_iter=3, num_heads=4)
    reference = distilled_detector(narrow(), distiller).train()
    reduced = copy.deepcopy(reference)
    keep_predictions_in_float32(reduced.student)
    optimizers = [torch.optim.SGD(module.parameters(), 1e-3, momentum=0.9) for module in (reference, reduced)]
    worst = 0.0
    with EventStorage():
        for iteration, batch in enumerate(batches(dataset, 20)):
            totals = []
            for module, optimizer in zip((reference, reduced), optimizers, strict=True):
                module.iteration = iteration
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=module is reduced):
                    total = sum(module(batch).values())
                total.backward()
                optimizer.step()
                totals.append(total.item())
            worst = max(worst, abs(totals[1] / totals[0] - 1))
    assert 0 < worst < 0.02


def test_under_autocast_convolutions_are_reduced_and_predictions_and_losses_are_not(
    dataset: CocoDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = narrow().train()
    keep_predictions_in_float32(student)
    seen: dict[str, set[torch.dtype]] = {"pyramid": set(), "tower": set(), "predictions": set()}
    student.backbone.fpn_output3.register_forward_hook(lambda _m, _i, out: seen["pyramid"].add(out.dtype))
    student.head.cls_subnet.register_forward_hook(lambda _m, _i, out: seen["tower"].add(out.dtype))
    losses_of = RetinaNet.losses

    def losses(detector: Any, anchors: Any, logits: Any, labels: Any, deltas: Any, boxes: Any) -> Any:
        seen["predictions"] |= {value.dtype for value in [*logits, *deltas]}
        return losses_of(detector, anchors, logits, labels, deltas, boxes)

    monkeypatch.setattr(RetinaNet, "losses", losses)
    module = distilled_detector(student, LGD).train()
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        found = module(batches(dataset, 1)[0])
    assert seen["pyramid"] == {torch.bfloat16}
    assert torch.bfloat16 in seen["tower"]
    assert seen["predictions"] == {torch.float32}
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_without_autocast_keeping_predictions_in_float32_changes_nothing(dataset: CocoDataset) -> None:
    plain, hooked = (distilled_detector(narrow(), NoDistillerConfig()).train() for _ in range(2))
    keep_predictions_in_float32(hooked.student)
    batch = batches(dataset, 1)[0]
    with EventStorage():
        assert {k: v.item() for k, v in plain(batch).items()} == {k: v.item() for k, v in hooked(batch).items()}
    assert set(hooked.student.state_dict()) == set(plain.student.state_dict())


# divergence


class NanAt(RetinaNet):
    """A RetinaNet whose box loss is NaN from one iteration on."""

    def losses(self, *arguments: Any) -> dict[str, torch.Tensor]:
        found = super().losses(*arguments)
        self.num_calls += 1
        if self.num_calls > self.first_bad:
            found["loss_box_reg"] = found["loss_box_reg"] * torch.nan
        return found


@pytest.mark.parametrize(("log_period", "first_bad"), [(1, 5), (4, 6), (50, 3)])
def test_a_loss_that_is_not_finite_is_named_with_its_first_iteration_and_the_last_good_checkpoint_stays(
    tmp_path: Path, dataset: CocoDataset, log_period: int, first_bad: int
) -> None:
    student = narrow()
    student.__class__ = NanAt
    student.num_calls, student.first_bad = 0, first_bad
    settings = config(20, log_period_iters=log_period, checkpoint_period_iters=2)
    with pytest.raises(LossNotFinite, match=rf"diverged: loss_box_reg is nan at iteration {first_bad} "):
        run(tmp_path, dataset, settings, student=student, distiller=NoDistillerConfig())
    kept = {int(path.stem.removeprefix("model_")): path for path in tmp_path.glob("model_*.pth")}
    assert max(kept) == (first_bad // 2) * 2 - 1, "every checkpoint before the loss went bad, and none after"
    assert all(names_not_finite(read_checkpoint(path)) == [] for path in kept.values())
    assert (tmp_path / "last_checkpoint").read_text() == kept[max(kept)].name


def test_a_state_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    student = narrow()
    checkpointer = StudentCheckpointer(student, str(tmp_path))
    checkpointer.save("good", iteration=3)
    with torch.no_grad():
        student.head.cls_score.bias[0] = torch.inf
    with pytest.raises(LossNotFinite, match=r"after iteration 4 model\.head\.cls_score\.bias are not finite"):
        checkpointer.save("bad", iteration=4)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["good.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "good.pth"


def test_the_optimizers_state_counts_too() -> None:
    state = {"trainer": {"optimizer": {"student": {"state": {3: {"momentum_buffer": torch.tensor([1.0, torch.nan])}}}}}}
    assert names_not_finite(state) == ["trainer.optimizer.student.state.3.momentum_buffer"]


def test_losses_are_averaged_over_the_iterations_since_they_were_read() -> None:
    record = LossRecord()
    for iteration, value in enumerate((1.0, 3.0)):
        record.add(iteration, {"a": torch.tensor(value), "b": torch.tensor(2.0)})
    record.add(2, {"a": torch.tensor(5.0)})
    record.read()
    assert record.means() == {"a": 3.0, "b": 2.0}
    record.forget()
    record.read()
    assert record.means() == {}


# averages of weights


def test_the_shipped_student_is_the_average_and_the_trained_one_is_kept_beside_it(
    tmp_path: Path, dataset: CocoDataset
) -> None:
    for name in ("plain", "averaged"):
        (tmp_path / name).mkdir()
    settings = {"max_iter": 3, "learning_rate": 1e-2}
    run(tmp_path / "plain", dataset, config(**settings), student=narrow())
    run(tmp_path / "averaged", dataset, config(**settings, ema_decay=0.5), student=narrow())
    plain, averaged = final(tmp_path / "plain"), final(tmp_path / "averaged")
    assert differing(averaged["student_without_average"], plain["model"]) == [], "averaging changes no training"
    assert "student_without_average" not in plain
    assert set(averaged["model"]) == set(plain["model"])
    assert ".head.cls_score.bias" in differing(averaged["model"], plain["model"])


def test_an_average_follows_the_weights_and_forgets_where_it_started() -> None:
    student = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    with torch.no_grad():
        student[0].weight.fill_(1.0)
    hook = AverageHook(student, decay=0.9)
    expected = 1.0
    for iteration, value in enumerate((2.0, 4.0, 8.0)):
        with torch.no_grad():
            student[0].weight.fill_(value)
        student[1].num_batches_tracked += 1
        hook.trainer = types.SimpleNamespace(iter=iteration)
        hook.after_step()
        decay = min(0.9, (2 + iteration) / (11 + iteration))
        expected = decay * expected + (1 - decay) * value
    assert hook.averaged[0].weight.item() == pytest.approx(expected)
    assert hook.averaged[1].num_batches_tracked.item() == 3
    assert not any(p.requires_grad for p in hook.averaged.parameters())


# compiled parts


def test_a_compiled_student_has_the_same_keys_losses_and_frozen_gradients(
    dataset: CocoDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured by the compiler, but run by torch's own operators: a C++ compiler would take a minute."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda part, **given: compile_module(part, backend="aot_eager", **given))
    monkeypatch.setattr("training.acceleration.check_compiler", lambda device: None)
    modules = [distilled_detector(narrow(), NoDistillerConfig(freeze_backbone_until_iter=1)).train() for _ in range(2)]
    compile_student(modules[1].student)
    torch.compiler.reset()
    assert set(modules[0].state_dict()) == set(modules[1].state_dict())
    found: list[dict[str, float]] = []
    for module in modules:
        with EventStorage():
            losses = module(batches(dataset, 1)[0])
        sum(losses.values()).backward()
        found.append({name: value.item() for name, value in losses.items()})
        assert all(p.grad is None for p in module.student.backbone.bottom_up.parameters())
        assert module.student.backbone.fpn_output3.weight.grad is not None
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "network and head were captured"


def test_a_machine_that_cannot_compile_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(function: Any) -> Any:
        def call(*_: Any) -> None:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(CompilerMissing, match=r"No working C\+\+ compiler found.*training\.compile=false"):
        check_compiler(torch.device("cpu"))


# batches


def test_a_batch_is_sent_once_and_what_is_there_already_is_not_copied(dataset: CocoDataset) -> None:
    batch = batches(dataset, 1)[0]
    moved = on_device(batch, torch.device("cpu"))
    for before, after in zip(batch, moved, strict=True):
        assert after["image"] is before["image"]
        assert after["instances"].gt_boxes.tensor is before["instances"].gt_boxes.tensor
        assert set(after["instances"].get_fields()) == set(before["instances"].get_fields())
    elsewhere = on_device(batch, torch.device("meta"))[0]
    assert elsewhere["image"].device.type == elsewhere["instances"].gt_boxes.device.type == "meta"
    assert elsewhere["instances"].gt_classes.device.type == "meta"
    assert batch[0]["image"].device.type == "cpu", "the loader's own batch is left alone"
