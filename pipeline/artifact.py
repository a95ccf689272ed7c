"""Artifacts: a stage's files and the manifest that describes them; the only JSON schema of stage outputs.

A *digest* is the SHA-256 of bytes, a *fingerprint* the SHA-256 of canonical JSON (sorted keys, no spaces). A manifest
carries the digest of its own content, so a truncated or hand-edited manifest is damage like any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known about one artifact. Every value is plain JSON.

    Attributes:
        stage, stage_version: which code wrote it.
        fingerprint: of everything that decided the result; equal fingerprints mean that nothing has to be done.
        inputs: content digest of each artifact read, by stage name, and of what was read from outside the run.
        config: the resolved recipe sections that the stage declares, by section name.
        environment: the environment keys that the stage declares, with their values.
        machine: all facts about the machine; for people, not part of the fingerprint.
        files: ``{"sha256", "size_bytes"}`` of each file, by path relative to the artifact.
        facts: what the stage found out.
        gates: ``{"name", "value", "limit", "passed", "reason"}`` of each gate.
        command: the command that reproduces the artifact.
        seconds: time the stage took, in this process.
        started, finished: UTC, ISO 8601.
    """

    stage: str
    stage_version: int
    fingerprint: str
    inputs: dict[str, str]
    config: dict[str, Any]
    environment: dict[str, Any]
    machine: dict[str, Any]
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    gates: list[dict[str, Any]]
    command: str
    seconds: float
    started: str
    finished: str
    schema: int = SCHEMA_VERSION

    @property
    def content_digest(self) -> str:
        """Digest of what the artifact is, without when it was made: a rebuilt but identical artifact keeps it."""
        return fingerprint({"fingerprint": self.fingerprint, "files": self.files})

    @property
    def size_bytes(self) -> int:
        return sum(entry["size_bytes"] for entry in self.files.values())

    @property
    def failed_gates(self) -> list[dict[str, Any]]:
        return [gate for gate in self.gates if not gate["passed"]]

    def write(self, directory: Path) -> None:
        content = plain(dataclasses.asdict(self))
        content["manifest_sha256"] = fingerprint(content)
        (directory / MANIFEST_FILE).write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """A published artifact: its folder and its manifest."""

    directory: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """The path of one of its files.

        Raises:
            ArtifactError: the artifact has no such file.
        """
        if name not in self.manifest.files:
            raise ArtifactError(f"artifact {self.directory} has no file {name!r}; it has {sorted(self.manifest.files)}")
        return self.directory / name


def read_manifest(directory: Path) -> Manifest:
    """Read a manifest and check its own digest.

    Raises:
        ArtifactError: there is none, or it is damaged, or another version of the project wrote it.
    """
    path = directory / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"artifact missing: {path} does not exist. {_remedy(directory)}") from None
    except ValueError as error:
        raise ArtifactError(f"artifact damaged: {path} is not JSON ({error}). {_remedy(directory)}") from None
    expected = content.pop("manifest_sha256", None) if isinstance(content, dict) else None
    if expected is None:
        raise ArtifactError(f"artifact damaged: {path} is not a manifest with its digest. {_remedy(directory)}")
    found = fingerprint(content)
    if found != expected:
        raise ArtifactError(
            f"artifact damaged: the content of {path} has sha256 {found}, expected {expected}; it was changed after it "
            f"was written. {_remedy(directory)}"
        )
    names = {field.name for field in dataclasses.fields(Manifest)}
    if content.get("schema") != SCHEMA_VERSION or set(content) != names:
        raise ArtifactError(
            f"{path}: found schema {content.get('schema')}, expected {SCHEMA_VERSION}; another version of this project "
            f"wrote it. {_remedy(directory)}"
        )
    return Manifest(**content)


def verify(directory: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest. Files that the manifest does not name are not looked at.

    Raises:
        ArtifactError: names the first file that is missing or differs, what was expected and what was found.
    """
    for name, entry in manifest.files.items():
        path = directory / name
        try:
            size_bytes = path.stat().st_size
        except OSError:
            raise ArtifactError(f"artifact damaged: {path} is missing. {_remedy(directory)}") from None
        if size_bytes != entry["size_bytes"]:
            raise ArtifactError(
                f"artifact damaged: {path} has {size_bytes} bytes, expected {entry['size_bytes']}. {_remedy(directory)}"
            )
        found = digest(path)
        if found != entry["sha256"]:
            raise ArtifactError(
                f"artifact damaged: {path} has sha256 {found}, expected {entry['sha256']}; its bytes were changed "
                f"after it was published. {_remedy(directory)}"
            )


def open_artifact(directory: Path) -> Artifact:
    """Read and verify a published artifact.

    Raises:
        ArtifactError: missing or damaged.
    """
    manifest = read_manifest(directory)
    verify(directory, manifest)
    return Artifact(directory=directory, manifest=manifest)


def files_in(directory: Path) -> dict[str, dict[str, Any]]:
    """Digest and size of every file under ``directory`` but the manifest, by relative path."""
    return {
        path.relative_to(directory).as_posix(): {"sha256": digest(path), "size_bytes": path.stat().st_size}
        for path in _files(directory)
        if path != directory / MANIFEST_FILE
    }


def size_bytes_of(directory: Path) -> int:
    """Size of all files under ``directory``."""
    return sum(path.stat().st_size for path in _files(directory))


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def plain(value: Any) -> Any:
    """The plain JSON form of facts: dataclasses, tuples, paths and numpy numbers converted, NaN and infinities null.

    Raises:
        TypeError: a value has no JSON form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays, without importing numpy
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__} has no JSON form")


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _remedy(directory: Path) -> str:
    return (
        f"Restore the file, or rebuild the stage with '--force' (`python -m pipeline run RECIPE "
        f"--from {directory.name} --until {directory.name} --force`)."
    )
