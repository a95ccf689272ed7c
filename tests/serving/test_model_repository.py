"""Versions are published whole, once, and never touched again."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import serving.model_repository as model_repository
from export.engine_session import record_of
from export.signature import DetectorSignature
from serving.model_config import DynamicBatching, ModelConfig
from serving.model_repository import (
    RepositoryDamaged,
    config_digest,
    publish,
    serve_again,
    served_version,
    verify,
    verify_config,
    versions,
)
from tests.stand_in_engine import write_engine


def publish_model(repository: Path, model_file: Path, signature: DetectorSignature, **changes: Any) -> int:
    facts: dict[str, Any] = {"model_name": "m", "backend": "python", "provenance": {"run": "a"}} | changes
    return publish(repository, model_file=model_file, signature=signature, **facts)


def tree(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_version_holds_model_backend_signature_labels_and_manifest(
    tmp_path: Path, model_file: Path, signature: DetectorSignature
) -> None:
    assert publish_model(tmp_path, model_file, signature) == 1
    version = tmp_path / "m" / "1"
    assert {path.name for path in version.iterdir()} == {
        "model.onnx",
        "model.py",
        "batched_requests.py",
        "candidate_nms.py",
        "signature.json",
        "labels.txt",
        "manifest.json",
        "__pycache__",
    }
    assert (version / "model.onnx").read_bytes() == model_file.read_bytes()
    assert (version / "labels.txt").read_text() == "dark\ndim\nbright\n"
    assert DetectorSignature.read(version) == signature
    assert ModelConfig.from_pbtxt((tmp_path / "m" / "config.pbtxt").read_text()).name == "m"
    verify(version)


def test_the_other_backends_get_the_model_file_alone(
    tmp_path: Path, model_file: Path, signature: DetectorSignature
) -> None:
    plan = write_engine(tmp_path / "engine", model_file)
    publish_model(tmp_path, plan, signature, model_name="plan", backend="tensorrt")
    publish_model(tmp_path, model_file, signature, model_name="onnx", backend="onnxruntime")
    assert record_of(tmp_path / "plan" / "1" / "model.plan") == record_of(plan), "which says what it runs on"
    assert (tmp_path / "onnx" / "1" / "model.onnx").is_file()
    assert not list(tmp_path.rglob("*.py"))


def test_the_python_backends_get_all_that_they_import(
    tmp_path: Path, model_file: Path, signature: DetectorSignature
) -> None:
    publish_model(tmp_path, model_file, signature, model_name="onnx", backend="python")
    plan = write_engine(tmp_path / "engine", model_file)
    publish_model(tmp_path, plan, signature, model_name="plan", backend="python_tensorrt")
    shared = {"model.py", "batched_requests.py", "candidate_nms.py"}
    assert {path.name for path in (tmp_path / "onnx" / "1").glob("*.py")} == shared
    assert {path.name for path in (tmp_path / "plan" / "1").glob("*.py")} == shared | {"engine_session.py"}
    (tmp_path / "plan" / "1" / "engine.json").write_text("{}")
    with pytest.raises(RepositoryDamaged, match=r"engine\.json has SHA-256"):
        verify(tmp_path / "plan" / "1")


def test_the_same_model_is_not_published_twice(tmp_path: Path, model_file: Path, signature: DetectorSignature) -> None:
    publish_model(tmp_path, model_file, signature)
    before = tree(tmp_path)
    assert publish_model(tmp_path, model_file, signature) == 1
    assert tree(tmp_path) == before


def test_a_new_version_leaves_the_old_one_as_it_was(
    tmp_path: Path, model_file: Path, signature: DetectorSignature
) -> None:
    publish_model(tmp_path, model_file, signature)
    before = tree(tmp_path / "m" / "1")
    assert publish_model(tmp_path, model_file, signature, provenance={"run": "b"}) == 2
    assert tree(tmp_path / "m" / "1") == before
    assert versions(tmp_path, "m") == [1, 2]


def test_a_changed_option_rewrites_the_config_and_no_version(
    tmp_path: Path, model_file: Path, signature: DetectorSignature
) -> None:
    publish_model(tmp_path, model_file, signature)
    batching = DynamicBatching(max_queue_delay_microseconds=77)
    assert publish_model(tmp_path, model_file, signature, dynamic_batching=batching) == 1
    config = ModelConfig.from_pbtxt((tmp_path / "m" / "config.pbtxt").read_text())
    assert config.dynamic_batching == batching


def test_versions_are_whole_numbers_in_order_and_other_folders_are_not_versions(tmp_path: Path) -> None:
    for name in ("1", "2", "10", "007", "x3", ".hidden"):
        (tmp_path / "m" / name).mkdir(parents=True)
    assert versions(tmp_path, "m") == [1, 2, 10]
    assert versions(tmp_path, "nothing") == []


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.py", "candidate_nms.py", "signature.json", "labels.txt", "manifest.json"]
)
def test_a_flipped_byte_in_any_file_is_found_and_named(
    tmp_path: Path, model_file: Path, signature: DetectorSignature, name: str
) -> None:
    publish_model(tmp_path, model_file, signature)
    path = tmp_path / "m" / "1" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(RepositoryDamaged, match=str(path)):
        verify(path.parent)
    assert RepositoryDamaged.exit_code == 5


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_a_damaged_version_is_left_as_it_is_and_the_next_number_published(
    tmp_path: Path, model_file: Path, signature: DetectorSignature, name: str
) -> None:
    publish_model(tmp_path, model_file, signature)
    path = tmp_path / "m" / "1" / name
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    before = tree(tmp_path / "m" / "1")
    assert publish_model(tmp_path, model_file, signature) == 2
    assert tree(tmp_path / "m" / "1") == before
    verify(tmp_path / "m" / "2")
    assert publish_model(tmp_path, model_file, signature) == 2


def test_a_damaged_configuration_is_found_and_publishing_writes_it_anew(
    tmp_path: Path, model_file: Path, signature: DetectorSignature
) -> None:
    publish_model(tmp_path, model_file, signature)
    path = tmp_path / "m" / "config.pbtxt"
    expected, good = config_digest(tmp_path, "m"), path.read_bytes()
    verify_config(tmp_path, "m", expected)
    path.write_bytes(b"\xff" + good[1:])  # not even text
    with pytest.raises(RepositoryDamaged, match=str(path)):
        verify_config(tmp_path, "m", expected)
    assert served_version(tmp_path, "m") is None
    assert publish_model(tmp_path, model_file, signature) == 1
    assert path.read_bytes() == good


def test_an_earlier_version_is_served_again_with_its_own_configuration_until_the_next_is_published(
    tmp_path: Path, model_file: Path, signature: DetectorSignature
) -> None:
    assert served_version(tmp_path, "m") is None
    publish_model(tmp_path, model_file, signature)
    first = served_version(tmp_path, "m")
    assert first is not None
    publish_model(tmp_path, model_file, signature, provenance={"run": "b"})
    serve_again(tmp_path, first)
    found = served_version(tmp_path, "m")
    assert found is not None
    assert (found.version, found.config.version_policy.specific) == (1, (1,))
    assert json.loads(found.config.parameters["provenance"]) == {"run": "a"}
    publish_model(tmp_path, model_file, signature, provenance={"run": "b"})
    assert (found := served_version(tmp_path, "m")) is not None
    assert found.version == 2
    (tmp_path / "m" / "2" / "labels.txt").unlink()
    assert served_version(tmp_path, "m") is None, "a damaged version is nothing to go back to"


def test_a_missing_file_is_found_and_named(tmp_path: Path, model_file: Path, signature: DetectorSignature) -> None:
    publish_model(tmp_path, model_file, signature)
    (tmp_path / "m" / "1" / "model.onnx").unlink()
    with pytest.raises(RepositoryDamaged, match=r"model\.onnx has SHA-256 no such file"):
        verify(tmp_path / "m" / "1")


def test_a_manifest_edited_consistently_but_for_its_digest_is_found(
    tmp_path: Path, model_file: Path, signature: DetectorSignature
) -> None:
    publish_model(tmp_path, model_file, signature)
    path = tmp_path / "m" / "1" / "manifest.json"
    content = json.loads(path.read_text())
    content["provenance"]["run"] = "another"
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    with pytest.raises(RepositoryDamaged, match="was changed after publishing"):
        verify(path.parent)


def test_a_model_name_that_is_a_path_is_refused(tmp_path: Path, model_file: Path, signature: DetectorSignature) -> None:
    for name in ("../outside", "a.b", "", "a/b"):
        with pytest.raises(ValueError, match="model name"):
            publish_model(tmp_path, model_file, signature, model_name=name)
    assert not list(tmp_path.iterdir())


def _publish_and_hang_before_the_rename(repository: Path, model_file: Path, signature: DetectorSignature) -> None:
    model_repository._sync = lambda directory: time.sleep(60)
    publish_model(repository, model_file, signature)


def test_a_publisher_killed_halfway_leaves_no_version_and_the_next_one_cleans_up(
    tmp_path: Path, model_file: Path, signature: DetectorSignature
) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_publish_and_hang_before_the_rename, args=(tmp_path, model_file, signature)
    )
    process.start()
    staged = tmp_path / ".staging" / "m" / "manifest.json"
    deadline = time.monotonic() + 20
    while not staged.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert staged.exists()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert versions(tmp_path, "m") == []
    assert publish_model(tmp_path, model_file, signature) == 1
    verify(tmp_path / "m" / "1")
    assert not (tmp_path / ".staging").exists()


def test_a_missing_model_file_leaves_nothing_behind(tmp_path: Path, signature: DetectorSignature) -> None:
    with pytest.raises(FileNotFoundError):
        publish_model(tmp_path, tmp_path / "no.onnx", signature)
    assert not (tmp_path / ".staging").exists()
    assert versions(tmp_path, "m") == []
