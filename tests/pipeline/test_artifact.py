"""Manifests round-trip, and every kind of damage is named."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.artifact import (
    Artifact,
    Manifest,
    canonical_json,
    files_in,
    fingerprint,
    open_artifact,
    plain,
    read_manifest,
)
from pipeline.errors import ArtifactError


def write_artifact(directory: Path, **changes: object) -> Manifest:
    """An artifact of two files."""
    (directory / "sub").mkdir(parents=True)
    (directory / "model.onnx").write_bytes(b"model")
    (directory / "sub" / "empty").write_bytes(b"")
    manifest = Manifest(
        stage="export",
        stage_version=1,
        fingerprint="f" * 64,
        inputs={"strip": "a" * 64},
        config={"export": {"canvas": [64, 64]}},
        environment={},
        machine={},
        files=files_in(directory),
        facts={"opset": 17, "nothing": None},
        gates=[{"name": "checker", "value": 0, "limit": 0, "passed": True, "reason": ""}],
        command="python -m pipeline run toy",
        seconds=1.25,
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:01+00:00",
    )
    manifest = dataclasses.replace(manifest, **changes)
    manifest.write(directory)
    return manifest


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = write_artifact(tmp_path / "export")
    artifact = open_artifact(tmp_path / "export")
    assert artifact.manifest == manifest
    assert manifest.size_bytes == 5
    assert sorted(manifest.files) == ["model.onnx", "sub/empty"]


def test_the_content_digest_ignores_times_and_facts_but_not_files(tmp_path: Path) -> None:
    manifest = write_artifact(tmp_path / "export")
    later = dataclasses.replace(manifest, seconds=9.0, finished="2027", facts={"seconds": 9})
    assert later.content_digest == manifest.content_digest
    assert dataclasses.replace(manifest, files={}).content_digest != manifest.content_digest
    assert dataclasses.replace(manifest, fingerprint="e").content_digest != manifest.content_digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"modeL", r"export/model\.onnx has sha256 .+, expected "),
        (b"mode", r"export/model\.onnx has 4 bytes, expected 5"),
        (b"", r"export/model\.onnx has 0 bytes, expected 5"),
        (None, r"export/model\.onnx is missing"),
    ],
)
def test_a_damaged_file_is_named_with_what_was_expected(tmp_path: Path, content: bytes | None, message: str) -> None:
    write_artifact(tmp_path / "export")
    file = tmp_path / "export" / "model.onnx"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        open_artifact(tmp_path / "export")
    assert "--force" in str(caught.value)


def test_a_file_that_the_manifest_does_not_name_is_not_damage(tmp_path: Path) -> None:
    write_artifact(tmp_path / "export")
    (tmp_path / "export" / "notes.txt").write_text("mine")
    open_artifact(tmp_path / "export")


def test_every_truncation_of_a_manifest_is_damage(tmp_path: Path) -> None:
    write_artifact(tmp_path / "export")
    path = tmp_path / "export" / "manifest.json"
    data = path.read_bytes()
    for length in range(0, len(data) - 2, 97):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=r"manifest\.json is not JSON"):
            open_artifact(tmp_path / "export")


def test_a_hand_edited_manifest_is_damage(tmp_path: Path) -> None:
    write_artifact(tmp_path / "export")
    path = tmp_path / "export" / "manifest.json"
    path.write_text(path.read_text().replace('"opset": 17', '"opset": 18'))
    with pytest.raises(ArtifactError, match="it was changed after it was written"):
        open_artifact(tmp_path / "export")


@pytest.mark.parametrize("text", ["[]", "{}", '"text"', "null"])
def test_other_json_is_not_a_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="not a manifest"):
        read_manifest(tmp_path)


def test_a_missing_manifest_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        read_manifest(tmp_path)


def test_another_schema_is_told_apart_from_damage(tmp_path: Path) -> None:
    write_artifact(tmp_path / "export", schema=99)
    with pytest.raises(ArtifactError, match="found schema 99, expected 1"):
        open_artifact(tmp_path / "export")


def test_an_artifact_gives_only_paths_of_its_files(tmp_path: Path) -> None:
    manifest = write_artifact(tmp_path / "export")
    artifact = Artifact(directory=tmp_path / "export", manifest=manifest)
    assert artifact.path("model.onnx").read_bytes() == b"model"
    with pytest.raises(ArtifactError, match=r"no file 'model\.plan'"):
        artifact.path("model.plan")


def test_facts_become_plain_json() -> None:
    @dataclasses.dataclass
    class Facts:
        size: tuple[int, int]
        path: Path

    value = {"facts": Facts((1, 2), Path("a/b")), "ap": np.float32(0.5), "nan": float("nan"), 3: np.arange(2)}
    expected = {"facts": {"size": [1, 2], "path": "a/b"}, "ap": 0.5, "nan": None, "3": [0, 1]}
    assert plain(value) == expected
    assert json.loads(canonical_json(value)) == expected
    with pytest.raises(TypeError, match="has no JSON form"):
        plain({"model": object()})


def test_fingerprints_do_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": (1, 2), "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_forty_megabytes_in_2400_files_verify_in_well_under_two_seconds(tmp_path: Path) -> None:
    data = os.urandom(17_000)
    for index in range(2_400):
        (tmp_path / f"{index}.jpg").write_bytes(data)
    manifest = dataclasses.replace(write_artifact(tmp_path / "other"), files=files_in(tmp_path))
    manifest.write(tmp_path)
    started = time.process_time()  # processor time, so that a busy machine does not fail it
    open_artifact(tmp_path)
    assert time.process_time() - started < 1.5
