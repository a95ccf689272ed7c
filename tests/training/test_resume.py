"""An interrupted training ends where an uninterrupted one does, bit for bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny_retinanet
from torch import nn

from pipeline import recipe_parts
from tests.training.training_runs import coco_of_equal_images, config, differing, final, run
from training import distilled_detector
from training.config import OptimizerConfig
from training.dataset import CocoDataset
from training.loader import DrawnImages, Draws, training_loader
from training.student import build_student

TEN = {"max_iter": 10, "checkpoint_period_iters": 5, "lr_schedule": "cosine"}
TEACHER = OptimizerConfig(optimizer="adamw", learning_rate=1e-3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return coco_of_equal_images(tmp_path_factory.mktemp("equal"), size=(64, 96))


class Killed(BaseException):
    """Like SIGKILL it passes through every ``except Exception``."""


def killed_at(iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = distilled_detector.DistilledDetector.forward

    def dying(module: Any, inputs: Any) -> Any:
        if module.iteration == iteration:
            raise Killed
        return forward(module, inputs)

    monkeypatch.setattr(distilled_detector.DistilledDetector, "forward", dying)


def retinanet() -> nn.Module:
    return build_tiny_retinanet(num_classes=3, channels=16)


def faster_rcnn() -> nn.Module:
    """Samples proposals and regions at random in every pass."""
    tree = recipe_parts.faster_rcnn(
        recipe_parts.timm_backbone("mobilenetv2_035", weights=None, out_features=("res2", "res3", "res4", "res5")),
        channels=16, num_proposals=20, box_head_channels=(16,),
    )  # fmt: skip
    tree.roi_heads.batch_size_per_image = 8
    tree.proposal_generator.batch_size_per_image = 8
    return build_student(tree, 3, seed=0)


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (retinanet, {"num_workers": 2, "teacher_optimizer": TEACHER, "ema_decay": 0.9, "log_period_iters": 3}),
        (retinanet, {"accumulate_batches": 2, "precision": "bf16"}),
        # With workers, what augments the images does not seed the process that trains.
        (faster_rcnn, {"images_per_batch": 1, "num_workers": 1}),
    ],
    ids=["retinanet with workers, teacher optimizer and average", "retinanet in parts and bf16", "faster r-cnn"],
)
def test_ten_iterations_end_as_five_and_a_kill_and_five(
    tmp_path: Path, dataset: CocoDataset, monkeypatch: pytest.MonkeyPatch, build: Any, changes: dict[str, Any]
) -> None:
    settings = config(**{**TEN, **changes})
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
    run(tmp_path / "once", dataset, settings, student=build())
    with monkeypatch.context() as patch:
        killed_at(7, patch)
        with pytest.raises(Killed):
            run(tmp_path / "twice", dataset, settings, student=build())
    torch.manual_seed(99)  # another process has another state of every generator
    random.seed(99)
    np.random.seed(99)
    assert run(tmp_path / "twice", dataset, settings, student=build()).num_resumed == 1
    once, twice = final(tmp_path / "once"), final(tmp_path / "twice")
    assert differing(once, twice) == []
    assert once["trainer"]["hooks"]["DistillationHook"] == twice["trainer"]["hooks"]["DistillationHook"]
    started = build().state_dict()
    assert any(not torch.equal(started[key], value) for key, value in once["model"].items())


def test_a_process_that_was_killed_goes_on_bit_for_bit(tmp_path: Path, dataset: CocoDataset) -> None:
    """Every training in a process of its own: what TorchScript has compiled by then must not matter."""

    def trained(name: str, *, dies_at: int | None) -> subprocess.CompletedProcess[str]:
        here = Path(__file__).resolve()
        script = tmp_path / "training.py"
        script.write_text(
            f"import os, signal, sys; sys.path[:0] = {[str(here.parents[i]) for i in range(3)]}\n"
            "from pathlib import Path\n"
            "from training.dataset import read_coco\n"
            "from training.trainer import Trainer\n"
            "import tests.training.test_resume as this\n"
            "from tests.training.training_runs import config, run\n"
            "step = Trainer.run_step\n"
            "def dying(trainer):\n"
            f"    if trainer.iter == {dies_at}: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    step(trainer)\n"
            "Trainer.run_step = dying\n"
            f"dataset = read_coco(Path({str(dataset.annotation_file)!r}))\n"
            f"run(Path({str(tmp_path / name)!r}), dataset, config(**this.TEN), student=this.retinanet())\n"
        )
        (tmp_path / name).mkdir(exist_ok=True)
        return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)

    killed = trained("twice", dies_at=7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    for name in ("once", "twice"):
        done = trained(name, dies_at=None)
        assert done.returncode == 0, done.stderr[-2000:]
    assert differing(final(tmp_path / "once"), final(tmp_path / "twice")) == []


def test_the_draws_of_several_processes_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(rank: int, world: int, first: int, number: int) -> list[tuple[int, int]]:
        monkeypatch.setattr("training.loader.comm.get_rank", lambda: rank)
        monkeypatch.setattr("training.loader.comm.get_world_size", lambda: world)
        draws = iter(Draws(7, seed=3, first=first))
        return [next(draws) for _ in range(number)]

    alone = drawn(0, 1, 0, 28)
    assert sorted([*drawn(0, 2, 0, 14), *drawn(1, 2, 0, 14)]) == alone
    assert drawn(0, 1, 11, 17) == alone[11:]
    passes = [[index for _, index in alone[i : i + 7]] for i in range(0, 28, 7)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len({tuple(order) for order in passes}) > 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_drawn_depends_on_the_number_of_the_draw_alone(dataset: CocoDataset, num_workers: int) -> None:
    settings = config(num_workers=num_workers, short_edge_pixels=(48, 56, 64, 72), images_per_batch=1, seed=5)
    plain = config(short_edge_pixels=(48, 56, 64, 72), images_per_batch=1, seed=5)
    late = iter(training_loader(retinanet(), settings, dataset, start_iter=5))
    early = iter(training_loader(retinanet(), plain, dataset, start_iter=0))
    expected = [next(early)[0] for _ in range(8)]
    random.seed(1)
    for image in expected[5:]:
        found = next(late)[0]
        assert torch.equal(found["image"], image["image"])
        assert torch.equal(found["instances"].gt_boxes.tensor, image["instances"].gt_boxes.tensor)
    assert len({tuple(image["image"].shape) for image in expected}) > 1, "the augmentation varies"


def test_another_seed_augments_otherwise(dataset: CocoDataset) -> None:
    loader = training_loader(retinanet(), config(short_edge_pixels=tuple(range(48, 80))), dataset, start_iter=0)
    records, mapper = loader.dataset._records, loader.dataset._mapper
    shapes = {tuple(DrawnImages(records, mapper, seed)[0, 0]["image"].shape) for seed in range(6)}
    assert len(shapes) > 1
