"""Several processes train what one trains with the same global batch; what they cannot train is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_retinanet
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import nn

from pipeline import recipe_parts
from tests.training.training_runs import NUM_CLASSES, coco_of_equal_images, config, final, run, tensors
from training.dataset import CocoDataset, read_coco
from training.distillers import LgdConfig
from training.launch import Launch, LaunchError, check_launch, parse_launch, process_group
from training.student import build_student
from training.tracking import METRICS_FILE

WORLD_MEAN = 24.0  # positive anchors of a batch, the same in every iteration
SETTINGS = {"max_iter": 3, "images_per_batch": 4, "warmup_iters": 0, "learning_rate": 1e-2}
LGD = LgdConfig(distill_from_iter=1, freeze_backbone_until_iter=2, num_heads=4)


class FixedNormalizer(RetinaNet):
    """RetinaNet whose losses are divided by a constant: by each process's share of the world's."""

    def _ema_update(self, name: str, value: float, initial_value: float, momentum: float = 0.9) -> float:
        return self.share


def student(kind: str, num_shares: int) -> nn.Module:
    """``"retinanet"`` with a fixed normaliser, or ``"paper_fcos"`` or ``"gfl"``, whose normalisers are means over the
    processes; one of GFL's depends on the predicted scores.

    Two norm groups: with a group of two channels, two values on the smallest level, normalisation keeps little but the
    sign of their difference, which rounding decides: the third loss was 4e-4 apart in float32, 4e-8 in float64.
    """
    if kind != "retinanet":
        part = {"paper_fcos": recipe_parts.paper_fcos, "gfl": recipe_parts.gfl}[kind]
        network = recipe_parts.timm_backbone("mobilenetv2_035", weights=None, freeze_norm=True)
        return build_student(part(network, channels=32, norm_groups=2), NUM_CLASSES, seed=0)
    detector = build_tiny_retinanet(num_classes=NUM_CLASSES, channels=16)
    detector.__class__ = FixedNormalizer
    detector.share = WORLD_MEAN / num_shares
    return detector


def train_in_this_process(
    kind: str, dataset: CocoDataset, directory: Path, *, num_processes: int = 1, accumulate_batches: int = 1
) -> None:
    directory.mkdir(exist_ok=True)
    settings = config(**SETTINGS, accumulate_batches=accumulate_batches)
    run(directory, dataset, settings, student=student(kind, num_processes * accumulate_batches), distiller=LGD)


def train_in_two_processes(kind: str, dataset: CocoDataset, directory: Path, *, accumulate_batches: int = 1) -> None:
    directory.mkdir()
    here = Path(__file__).resolve()
    script = directory / "worker.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(here.parents[i]) for i in (2, 1)]}\n"
        "from pathlib import Path\n"
        "import tests.training.test_distributed as this\n"
        "with this.process_group('cpu'):\n"
        f"    this.train_in_this_process({kind!r}, this.read_coco(Path({str(dataset.annotation_file)!r})),\n"
        f"        Path({str(directory)!r}), num_processes=2, accumulate_batches={accumulate_batches})\n"
    )
    command = [*parse_launch("torchrun --nproc-per-node=2").command, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def logged(directory: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (directory / METRICS_FILE).read_text().splitlines())
    return [{key: line[key] for key in line if "loss" in key} for line in lines]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return coco_of_equal_images(tmp_path_factory.mktemp("equal"), num_images=8, size=(64, 96))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["paper_fcos", "gfl"])
def test_two_processes_end_where_one_does_with_the_same_global_batch(
    kind: str, tmp_path: Path, dataset: CocoDataset
) -> None:
    train_in_this_process(kind, dataset, tmp_path / "one")
    train_in_two_processes(kind, dataset, tmp_path / "two")
    assert_same_training(kind, tmp_path / "one", tmp_path / "two")


def test_a_batch_in_parts_ends_where_the_whole_batch_does(tmp_path: Path, dataset: CocoDataset) -> None:
    train_in_this_process("retinanet", dataset, tmp_path / "whole")
    train_in_this_process("retinanet", dataset, tmp_path / "parts", accumulate_batches=2)
    assert_same_training("retinanet", tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_two_processes_with_batches_in_parts_end_there_too(tmp_path: Path, dataset: CocoDataset) -> None:
    train_in_this_process("retinanet", dataset, tmp_path / "one")
    train_in_two_processes("retinanet", dataset, tmp_path / "two", accumulate_batches=2)
    assert_same_training("retinanet", tmp_path / "one", tmp_path / "two")


def assert_same_training(kind: str, first: Path, second: Path) -> None:
    """The same losses and parameters to 1e-5, relative to a parameter's size or absolutely."""
    for expected, found in zip(logged(first), logged(second), strict=True):
        assert {"loss_distill", "loss_cls.tea", "total_loss"} <= set(expected)
        assert found == pytest.approx(expected, rel=1e-5)
    before = tensors(student(kind, 1).state_dict())
    one, two = (tensors({k: final(path)[k] for k in ("model", "distiller")}) for path in (first, second))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5)
    moved = max(float((one[f".model{name}"] - value).abs().max()) for name, value in before.items())
    assert moved > 1e-3, "three iterations move the student by far more than the tolerance"


@pytest.mark.parametrize(
    ("text", "num_nodes", "processes_per_node"),
    [
        ("torchrun --nproc-per-node=8", 1, 8),
        ("/opt/bin/torchrun --nproc_per_node 2", 1, 2),
        ("srun --ntasks-per-node=1 torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d", 4, 8),
        ("torchrun", 1, 1),
    ],
)
def test_the_number_of_processes_is_read_from_the_launch_command(
    text: str, num_nodes: int, processes_per_node: int
) -> None:
    launch = parse_launch(text)
    assert (launch.num_nodes, launch.processes_per_node) == (num_nodes, processes_per_node)
    assert launch.num_processes == num_nodes * processes_per_node
    assert launch.spans_nodes == text.startswith("srun")
    at = launch.command.index(sys.executable)
    assert launch.command[at : at + 3] == (sys.executable, "-m", "torch.distributed.run")


def test_a_training_on_one_node_gets_a_free_port_unless_the_command_names_one() -> None:
    assert "--standalone" in parse_launch("torchrun --nproc-per-node=2").command
    assert "--standalone" not in parse_launch("torchrun --nproc-per-node=2 --master-port=1234").command
    assert "--standalone" not in parse_launch("torchrun --nnodes=2 --rdzv-endpoint=a:1").command


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mpirun -n 2", "does not call torchrun"),
        ("torchrun --nproc-per-nod=2x", "torchrun"),
        ("torchrun --number=2", "torchrun does not take it: .*--number"),
        ("torchrun --nproc-per-node=many", "many"),
        ("torchrun --nnodes=1:4", "1 to 4 nodes; the number of processes has to be known"),
        ("torchrun --nproc-per-node=2 train.py", "names a program"),
        ("torchrun 'unfinished", "cannot be read"),
    ],
)
def test_a_launch_command_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        parse_launch(text)


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"images_per_batch is 16, .* 3 processes; .*images_per_batch=15 or 18"):
        check_launch(parse_launch("torchrun --nproc-per-node=3"), config(images_per_batch=16))
    with pytest.raises(LaunchError, match=r"8 processes x 4 parts; .*images_per_batch=32"):
        check_launch(parse_launch("torchrun --nproc-per-node=8"), config(images_per_batch=16, accumulate_batches=4))
    check_launch(parse_launch("torchrun --nproc-per-node=8"), config(images_per_batch=16, accumulate_batches=2))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launch = parse_launch("torchrun --nproc-per-node=4")
    with pytest.raises(LaunchError, match=r"starts 4 processes and this machine has 2 GPUs.*--nproc-per-node=2"):
        check_launch(launch, config(images_per_batch=4, device="auto"))
    check_launch(launch, config(images_per_batch=4, device="cpu"))
    elsewhere = Launch(text="srun torchrun", command=(), num_nodes=1, processes_per_node=4, spans_nodes=True)
    check_launch(elsewhere, config(images_per_batch=4, device="auto"))


def test_a_node_with_fewer_gpus_than_processes_is_refused_by_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="2 processes on a node with 1 GPUs"), process_group("auto"):
        pass


__all__ = ["process_group", "read_coco"]  # for the processes that a test starts
