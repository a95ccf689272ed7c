from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_retinanet
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from pipeline import recipe_parts
from training.detection_losses import loss_normalizer
from training.distilled_detector import (
    DistillationHook,
    DistilledDetector,
    bottom_up,
    without_bottom_up_gradient,
)
from training.distillers import LgdConfig, NoDistillerConfig
from training.launch import distributed
from training.schedule import DistillationSchedule
from training.student import build_student
from training.train import distilled_detector

LGD = LgdConfig(distill_from_iter=1, freeze_backbone_until_iter=1, num_heads=4)


def batch(empty: bool = False) -> list[dict[str, Any]]:
    instances = Instances((128, 160))
    boxes = torch.tensor([[8.0, 8.0, 60.0, 50.0], [70.0, 20.0, 150.0, 120.0]])[: 0 if empty else 2]
    instances.gt_boxes, instances.gt_classes = Boxes(boxes), torch.tensor([1, 4])[: len(boxes)]
    generator = torch.Generator().manual_seed(3)
    return [
        {"image": torch.randint(0, 256, (3, 128, 160), dtype=torch.uint8, generator=generator), "instances": instances}
    ]


def losses_of(module: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    with EventStorage():
        return module(inputs)


def test_without_a_distiller_the_losses_are_the_students(tiny_retinanet: nn.Module) -> None:
    module = distilled_detector(tiny_retinanet, NoDistillerConfig()).train()
    found = losses_of(module, batch())
    del tiny_retinanet.loss_normalizer
    expected = losses_of(tiny_retinanet, batch())
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}
    assert list(module.distiller.parameters()) == []


def test_with_lgd_the_students_losses_stay_and_the_teachers_come_beside_them(tiny_retinanet: nn.Module) -> None:
    module = distilled_detector(tiny_retinanet, LGD).train()
    found = losses_of(module, batch())
    normalizer = loss_normalizer(tiny_retinanet)
    del tiny_retinanet.loss_normalizer
    expected = losses_of(tiny_retinanet, batch())
    assert set(found) == {"loss_cls", "loss_box_reg", "loss_cls.tea", "loss_box_reg.tea", "loss_distill"}
    for name, value in expected.items():
        assert found[name].item() == value.item()
    assert normalizer == loss_normalizer(tiny_retinanet), "the teacher's pass must not move the loss normaliser"


@pytest.mark.parametrize("empty", [False, True])
def test_distillation_reaches_the_student_only_when_the_schedule_says_so(
    tiny_retinanet: nn.Module, empty: bool
) -> None:
    module = distilled_detector(tiny_retinanet, LGD).train()
    reached = []
    for iteration in (0, 1):
        module.iteration = iteration
        module.zero_grad()
        losses = losses_of(module, batch(empty))
        assert all(torch.isfinite(value) for value in losses.values())
        losses["loss_distill"].backward()
        reached.append(any(p.grad is not None and p.grad.any() for p in tiny_retinanet.parameters()))
        assert any(p.grad is not None and p.grad.any() for p in module.distiller.adapter.parameters())
    assert reached == [False, True]


def test_in_eval_mode_the_module_is_the_student(tiny_retinanet: nn.Module) -> None:
    module = distilled_detector(tiny_retinanet, LGD).eval()
    with torch.inference_mode():
        a, b = module(batch())[0]["instances"], tiny_retinanet(batch())[0]["instances"]
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def test_the_frozen_window_leaves_weights_and_optimizer_state_of_the_bottom_up_network_alone(
    tiny_retinanet: nn.Module,
) -> None:
    module = DistilledDetector(tiny_retinanet, NoDistillerConfig().build(channels=32, num_classes=5, level_names=[]),
                               DistillationSchedule(freeze_backbone_until_iter=1)).train()  # fmt: skip
    optimizer = torch.optim.AdamW(module.parameters(), 0.1, weight_decay=0.5)
    hook = DistillationHook(module)
    hook.trainer = type("Trainer", (), {"iter": 0})()
    frozen = dict(bottom_up(tiny_retinanet).named_parameters())
    before = {name: value.clone() for name, value in frozen.items()}
    pyramid = tiny_retinanet.backbone.fpn_output3.weight.clone()
    for iteration in (0, 1):
        hook.trainer.iter = iteration
        hook.before_step()
        optimizer.zero_grad()
        sum(losses_of(module, batch()).values()).backward()
        optimizer.step()
        unchanged = all(torch.equal(value, before[name]) for name, value in frozen.items())
        untouched = not any(optimizer.state[value] for value in frozen.values() if value in optimizer.state)
        assert (unchanged, untouched) == ((True, True) if iteration == 0 else (False, False))
    assert not torch.equal(pyramid, tiny_retinanet.backbone.fpn_output3.weight)


def with_batch_norm() -> nn.Module:
    """A tiny RetinaNet whose network below the pyramid gathers batch statistics."""
    tree = recipe_parts.retinanet(
        recipe_parts.timm_backbone("mobilenetv2_035", weights=None), channels=32, num_head_convs=1
    )
    return build_student(tree, 5, seed=0)


def test_freezing_changes_no_loss_no_statistic_and_no_gradient_but_the_bottom_up_networks() -> None:
    grads, losses, statistics = [], [], []
    for frozen in (False, True):
        distiller = LgdConfig(distill_from_iter=0, freeze_backbone_until_iter=int(frozen), num_heads=4)
        torch.manual_seed(0)
        module = distilled_detector(with_batch_norm(), distiller).train()
        found = losses_of(module, batch())
        sum(found.values()).backward()
        losses.append({name: value.item() for name, value in found.items()})
        grads.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
        statistics.append({k: v for k, v in module.student.state_dict().items() if "running_" in k})
    assert losses[0] == losses[1]
    below = {name for name in grads[0] if name.startswith("student.backbone.bottom_up.")}
    assert below
    assert set(grads[1]) == set(grads[0]) - below
    for name, grad in grads[1].items():
        torch.testing.assert_close(grad, grads[0][name])
    fresh = with_batch_norm().state_dict()
    assert any(not torch.equal(value, fresh[key]) for key, value in statistics[0].items())
    assert all(torch.equal(value, statistics[1][key]) for key, value in statistics[0].items())


def test_a_frozen_network_records_no_gradient_and_is_itself_again_afterwards(tiny_retinanet: nn.Module) -> None:
    recorded: list[bool] = []
    network = bottom_up(tiny_retinanet)
    network.register_forward_hook(lambda _m, _i, out: recorded.append(out["res5"].requires_grad))
    keys = list(tiny_retinanet.state_dict())
    module = distilled_detector(tiny_retinanet, LGD).train()
    for module.iteration in (0, 1):
        losses_of(module, batch())
    assert recorded == [False, True]
    assert tiny_retinanet.backbone.bottom_up is network
    assert list(tiny_retinanet.state_dict()) == keys


def test_a_backbone_without_a_pyramid_is_frozen_whole(tiny_retinanet: nn.Module) -> None:
    tiny_retinanet.backbone = tiny_retinanet.backbone.bottom_up
    tiny_retinanet.train()
    with without_bottom_up_gradient(tiny_retinanet):
        assert not tiny_retinanet.backbone(torch.zeros(1, 3, 64, 64))["res5"].requires_grad
    assert tiny_retinanet.backbone(torch.zeros(1, 3, 64, 64))["res5"].requires_grad


def test_the_loss_normalizer_travels_with_the_checkpoint(tiny_retinanet: nn.Module) -> None:
    hook = DistillationHook(distilled_detector(tiny_retinanet, LGD))
    hook.load_state_dict({"loss_normalizer": 42.0})
    assert loss_normalizer(tiny_retinanet) == 42.0
    assert hook.state_dict() == {"loss_normalizer": 42.0}
    hook.load_state_dict({"loss_normalizer": None})
    assert not hasattr(tiny_retinanet, "loss_normalizer")


def train_step_of_one_of_two_processes(rank: int, rendezvous: str) -> None:
    """Both processes must end the backward pass with the same gradients, one of them having no object."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=2)
    module = distilled_detector(build_tiny_retinanet(), LGD).train()
    module.iteration = 1
    model = distributed(module)
    sum(losses_of(model, batch(empty=rank == 1)).values()).backward()
    total = sum(float(p.grad.double().abs().sum()) for p in module.parameters() if p.grad is not None)
    totals = [0.0, 0.0]
    torch.distributed.all_gather_object(totals, total)
    torch.distributed.destroy_process_group()
    assert totals[0] == totals[1] > 0


def test_two_processes_agree_on_the_gradients(tmp_path: Path) -> None:
    here = Path(__file__).resolve()
    code = (
        f"import sys; sys.path[:0] = {[str(here.parents[i]) for i in range(3)]}\n"
        "import torch, test_distilled_detector as this\n"
        "if __name__ == '__main__':\n"
        f"    torch.multiprocessing.spawn(\n"
        f"        this.train_step_of_one_of_two_processes, ('file://{tmp_path}/rendezvous',), 2)\n"
    )
    script = tmp_path / "two_processes.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
