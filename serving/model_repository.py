"""Publish model versions into a Triton model repository, and verify them.

``<repository>/<model>/config.pbtxt`` and ``<repository>/<model>/<version>/{model file, signature.json, labels.txt,
manifest.json}``; what this project's Python backends consist of (:data:`BACKEND_FILES`) and the record of an engine lie
in the version too. Everything that belongs to one version is in its directory, because Triton reloads every version
when a file at model level changes. A version is staged on the same file system and renamed into place, so a server
never sees half of one, and an existing version is never touched, not even a damaged one: publishing goes on with the
next number.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from google.protobuf import text_format

from export import candidate_nms, engine_session
from export.engine_session import RECORD_FILE
from export.signature import DetectorSignature
from serving.model_config import (
    ENGINE_BACKENDS,
    MODEL_FILE_OF_BACKEND,
    Backend,
    DynamicBatching,
    InstanceGroup,
    ModelConfig,
    VersionPolicy,
    check_model_name,
    model_config_for,
)

MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.pbtxt"
LABELS_FILE = "labels.txt"
_BACKENDS = Path(__file__).parent / "backends"
_SHARED = (_BACKENDS / "batched_requests.py", Path(candidate_nms.__file__))
BACKEND_FILES: dict[Backend, tuple[Path, ...]] = {
    "python": (_BACKENDS / "onnxruntime_backend" / "model.py", *_SHARED),
    "python_tensorrt": (_BACKENDS / "tensorrt_backend" / "model.py", *_SHARED, Path(engine_session.__file__)),
}
"""What a version of this project's Python backends holds besides the model file; needs nothing else of the project."""
_STAGING = ".staging"
_LOCK = ".publish.lock"
# Where this name is taken by a file, importing model.py writes no .pyc. Files that appear in a version after its first
# load make Triton take it for changed, and PYTHONDONTWRITEBYTECODE does not reach the backend's isolated Python.
# Not in the manifest: tools that copy repositories like to leave the name out.
_NO_BYTE_CODE = "__pycache__"


class RepositoryDamaged(RuntimeError):
    """A file of a published model is missing or is not the one that was published."""

    exit_code = 5


def publish(
    repository: Path,
    *,
    model_name: str,
    model_file: Path,
    signature: DetectorSignature,
    backend: Backend,
    provenance: Mapping[str, object],
    instance_group: InstanceGroup | None = None,
    dynamic_batching: DynamicBatching | None = None,
    num_threads: int = 0,
    allow_spinning: bool = False,
) -> int:
    """Add a version of a model and write the model's ``config.pbtxt``.

    When the newest version holds the same bytes and provenance and is intact, nothing is copied and its number is
    returned; the configuration, which says that the newest version is served, is rewritten only where it differs.

    Args:
        repository: created when missing.
        model_file: ONNX model; for the backends that serve one a TensorRT engine, with its record beside it.
        provenance: what the model came from, JSON values; also in the configuration's ``parameters``.

    Returns:
        The version.

    Raises:
        ValueError: the name cannot be a model's name.
    """
    check_model_name("the model name", model_name)
    config = model_config_for(
        signature,
        name=model_name,
        backend=backend,
        provenance=provenance,
        instance_group=instance_group or InstanceGroup(),
        dynamic_batching=dynamic_batching or DynamicBatching(),
        num_threads=num_threads,
        allow_spinning=allow_spinning,
    )
    model_directory = repository / model_name
    model_directory.mkdir(parents=True, exist_ok=True)
    with _only_publisher(repository) as staging:
        staged = staging / model_name
        staged.mkdir()
        shutil.copyfile(model_file, staged / MODEL_FILE_OF_BACKEND[backend])
        if backend in ENGINE_BACKENDS:
            shutil.copyfile(model_file.with_name(RECORD_FILE), staged / RECORD_FILE)
        for file in BACKEND_FILES.get(backend, ()):
            shutil.copyfile(file, staged / file.name)
        signature.write(staged)
        (staged / LABELS_FILE).write_text("".join(f"{name}\n" for name in signature.class_names))
        content = {"model_name": model_name, "backend": backend, "provenance": dict(provenance)}
        (staged / MANIFEST_FILE).write_text(_manifest_text(content | {"files": _digests(staged)}))

        version = max(versions(repository, model_name), default=0)
        if not _holds(model_directory / str(version), (staged / MANIFEST_FILE).read_text()):
            version += 1
            (staged / _NO_BYTE_CODE).write_text("A file, so that Python cannot write byte code into this version.\n")
            _sync(staged)
            os.rename(staged, model_directory / str(version))
            _sync_directory(model_directory)
        _write_if_different(model_directory / CONFIG_FILE, config.to_pbtxt(), staging)
    return version


def _holds(version_directory: Path, manifest: str) -> bool:
    """Whether a version is there, intact, and what the manifest says."""
    try:
        verify(version_directory)
    except RepositoryDamaged:
        return False
    return (version_directory / MANIFEST_FILE).read_text() == manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedVersion:
    """The version that a model's configuration lets a server serve, with that configuration."""

    version: int
    config: ModelConfig


def served_version(repository: Path, model_name: str) -> ServedVersion | None:
    """What a server would serve of a model; None where that is nothing, or nothing intact."""
    directory = repository / model_name
    try:
        config = ModelConfig.from_pbtxt((directory / CONFIG_FILE).read_text())
        version = max(config.version_policy.specific or versions(repository, model_name), default=0)
        verify(directory / str(version))
    except (OSError, ValueError, IndexError, text_format.ParseError, RepositoryDamaged):
        return None
    return ServedVersion(version=version, config=config)


def serve_again(repository: Path, served: ServedVersion) -> None:
    """Write the configuration that serves an earlier version and no newer one; publishing ends that."""
    config = dataclasses.replace(served.config, version_policy=VersionPolicy(specific=(served.version,)))
    with _only_publisher(repository) as staging:
        _write_if_different(repository / config.name / CONFIG_FILE, config.to_pbtxt(), staging)


def versions(repository: Path, model_name: str) -> list[int]:
    """The published versions of a model, ascending."""
    directory = repository / model_name
    names = [path.name for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"[1-9][0-9]*", name))


def config_digest(repository: Path, model_name: str) -> str:
    """SHA-256 of a model's configuration."""
    return _found_digest(repository / model_name / CONFIG_FILE)


def verify_config(repository: Path, model_name: str, expected_digest: str) -> None:
    """Check a model's configuration against the digest it had.

    Raises:
        RepositoryDamaged: it is missing or differs.
    """
    _expect_digest(repository / model_name / CONFIG_FILE, expected_digest, "when it was written it had")


def verify(version_directory: Path) -> None:
    """Check every file of a version against its manifest.

    Raises:
        RepositoryDamaged: names the first file that is missing or differs.
    """
    path = version_directory / MANIFEST_FILE
    try:
        text = path.read_text()
        files = json.loads(text)["files"]
        intact = text == _manifest_text(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RepositoryDamaged(f"model repository damaged: {path} cannot be read ({error})") from error
    if not intact:
        raise RepositoryDamaged(f"model repository damaged: {path} was changed after publishing")
    for name, expected in files.items():
        _expect_digest(version_directory / name, expected["sha256"], "its manifest says")


def _expect_digest(path: Path, expected: str, source: str) -> None:
    found = _found_digest(path)
    if found != expected:
        raise RepositoryDamaged(f"model repository damaged: {path} has SHA-256 {found}, {source} {expected}")


def _found_digest(path: Path) -> str:
    return _sha256(path) if path.is_file() else "no such file"


@contextmanager
def _only_publisher(repository: Path) -> Iterator[Path]:
    """An empty staging directory inside the repository, for one publisher at a time.

    It has a leading dot and lies beside the models, not in one: files that come and go at model level would make Triton
    reload the model. What a killed publisher left is removed.
    """
    with (repository / _LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        staging = repository / _STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _manifest_text(content: Mapping[str, object]) -> str:
    """Canonical JSON, closed by a digest of the rest, so that a change inside the manifest shows as well."""
    body = {key: value for key, value in content.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"digest": digest}, indent=1, sort_keys=True) + "\n"


def _digests(directory: Path) -> dict[str, dict[str, object]]:
    return {
        path.name: {"sha256": _sha256(path), "size_bytes": path.stat().st_size} for path in sorted(directory.iterdir())
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_if_different(path: Path, text: str, staging: Path) -> None:
    if path.is_file() and path.read_bytes() == text.encode():
        return
    staged = staging / path.name
    staged.write_text(text)
    _sync_file(staged)
    os.replace(staged, path)
    _sync_directory(path.parent)


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        _sync_file(path)
    _sync_directory(directory)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
