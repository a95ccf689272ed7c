"""What a run deployed is verified, a GPU is taken where recipe and machine say so, servers are checked early."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import endpoint, environment
from pipeline.artifact import digest
from pipeline.endpoint import check_server, deployed, instance_group, repository_of, uses_gpu
from serving.config import ServingConfig
from serving.model_config import InstanceGroup
from serving.model_repository import RepositoryDamaged, publish, verify, versions
from serving.servers import ServerError
from tests.pipeline.small_run import SmallRun
from tests.serving.pixel_means import make_signature, needs_tritonserver

A_GPU = {"gpus": [{"name": "a GPU"}], "gpu_reason": None}
NO_GPU = {"gpus": [], "gpu_reason": "no NVIDIA GPU (driver not loaded)"}


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def small_run(tmp_path: Path) -> SmallRun:
    run = SmallRun(tmp_path)
    run.run()
    return run


@pytest.mark.server
@needs_tritonserver
def test_a_damaged_configuration_is_named_and_publishing_anew_repairs_it(small_run: SmallRun) -> None:
    deployed(small_run.run_dir)
    config = small_run.repository / "m" / "config.pbtxt"
    flip_a_byte(config)
    assert small_run.run().num_built == 0, "no artifact is damaged, so only deployed() can find it"
    with pytest.raises(RepositoryDamaged) as damage:
        deployed(small_run.run_dir)
    assert str(config) in str(damage.value)
    small_run.run(from_stage="deploy", force=True)
    assert deployed(small_run.run_dir).manifest.facts["config_digest"] == digest(config)
    config.unlink()
    with pytest.raises(RepositoryDamaged, match=r"config\.pbtxt has SHA-256 no such file"):
        deployed(small_run.run_dir)


@pytest.mark.server
@needs_tritonserver
def test_another_runs_newer_version_in_a_shared_repository_is_no_damage(small_run: SmallRun) -> None:
    publish(
        small_run.repository,
        model_name="m",
        model_file=small_run.run_dir / "export" / "model.onnx",
        signature=make_signature(),
        backend="python",
        provenance={"run": "another"},
    )
    assert deployed(small_run.run_dir).manifest.facts["version"] == 1


@pytest.mark.server
@needs_tritonserver
@pytest.mark.parametrize("damage", ["flipped byte", "removed"])
def test_the_command_in_the_message_replaces_a_damaged_version_and_leaves_it_as_it_is(
    small_run: SmallRun, damage: str
) -> None:
    version = small_run.repository / "m" / "1"
    if damage == "removed":
        version.rename(small_run.run_dir / "taken away")
    else:
        flip_a_byte(version / "model.onnx")
    before = {path.name: path.read_bytes() for path in version.iterdir()} if version.is_dir() else {}
    assert small_run.run().num_built == 0
    with pytest.raises(RepositoryDamaged, match=r"python -m pipeline run small\.py --from deploy --force$"):
        deployed(small_run.run_dir)
    small_run.run(from_stage="deploy", force=True)
    facts = deployed(small_run.run_dir).manifest.facts
    verify(small_run.repository / "m" / str(facts["version"]))
    if damage == "flipped byte":
        assert (facts["version"], versions(small_run.repository, "m")) == (2, [1, 2])
        assert {path.name: path.read_bytes() for path in version.iterdir()} == before


def test_a_model_runs_where_the_recipe_says_or_on_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, cpu, cuda = (ServingConfig(model_name="m", device=device) for device in ("auto", "cpu", "cuda"))
    monkeypatch.setattr(environment, "facts", lambda: A_GPU)
    assert [uses_gpu(config) for config in (auto, cpu, cuda)] == [True, False, True]
    assert instance_group(auto, "python") == InstanceGroup(kind="GPU", count=2, gpus=(0,))
    assert instance_group(cpu, "onnxruntime") == InstanceGroup(kind="CPU", count=2)
    monkeypatch.setattr(environment, "facts", lambda: NO_GPU)
    assert [uses_gpu(config) for config in (auto, cpu, cuda)] == [False, False, True]
    assert instance_group(auto, "python") == InstanceGroup(kind="CPU", count=2)
    for backend in ("tensorrt", "python_tensorrt"):
        assert instance_group(auto, backend).kind == "GPU", "engines have nothing else"


@needs_tritonserver
def test_a_gpu_asked_for_that_is_not_there_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "facts", lambda: NO_GPU)
    with pytest.raises(ServerError, match=r"serving\.device=cuda .*no NVIDIA GPU.*serving\.device=cpu"):
        check_server(ServingConfig(model_name="m", device="cuda"))
    assert ServerError.exit_code == 4
    check_server(ServingConfig(model_name="m"))
    with pytest.raises(ServerError, match=r"backend=python_tensorrt runs the engine, .* there is no NVIDIA GPU"):
        check_server(ServingConfig(model_name="m", backend="python_tensorrt"))
    # Another machine's GPU: the server at the url has it.
    check_server(ServingConfig(model_name="m", device="cuda", url="there:8001", repository="/models"))


def test_a_server_that_cannot_start_is_said_but_only_where_it_would_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match="no tritonserver on PATH"):
        check_server(ServingConfig(model_name="m", server="path"))
    check_server(ServingConfig(model_name="m", server="path", url="there:8001", repository="/models"))
    assert endpoint.not_executable(ServingConfig(model_name="m", server="container"))
    check_server(ServingConfig(model_name="m", server="container"))


def test_a_repository_outside_the_run_is_the_recipes(tmp_path: Path) -> None:
    assert repository_of(ServingConfig(model_name="m", repository="/models"), tmp_path) == Path("/models")
    assert repository_of(ServingConfig(model_name="m"), tmp_path) == tmp_path / "model_repository"
