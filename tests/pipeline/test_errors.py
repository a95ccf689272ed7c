"""The error file is complete, and every way of running out of space ends with exit code 4 and a place."""

from __future__ import annotations

import ast
import errno
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline import errors
from pipeline.errors import (
    ArtifactError,
    GateFailed,
    Interrupted,
    NoSpaceLeft,
    PipelineError,
    RecipeError,
    RunLocked,
    Terminated,
    Unavailable,
    exit_code_of,
    is_no_space,
    message_of,
)
from pipeline.stage import Gate

ROOT = Path(__file__).resolve().parents[2]


def _leaf_errors() -> dict[str, int]:
    """Every class with an ``exit_code`` in the packages that cannot import pipeline, by dotted name."""
    found = {}
    for package in ("training", "export", "serving"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.ClassDef):
                    continue
                for line in node.body:
                    targets = line.targets if isinstance(line, ast.Assign) else []
                    targets = [line.target] if isinstance(line, ast.AnnAssign) else targets
                    if any(isinstance(target, ast.Name) and target.id == "exit_code" for target in targets):
                        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                        found[f"{module}.{node.name}"] = ast.literal_eval(line.value)  # type: ignore[union-attr,arg-type]
    return found


def test_the_error_file_names_every_error_of_the_leaf_packages_with_its_exit_code() -> None:
    assert errors.__doc__ is not None
    drawn = {words[0]: words[1] for line in errors.__doc__.splitlines() if len(words := line.split()) > 1}
    found = _leaf_errors()
    assert found
    assert {name: drawn.get(name) for name in found} == {name: str(code) for name, code in found.items()}
    leaf = {name for name in drawn if name.startswith(("training.", "export.", "serving."))}
    assert leaf == set(found), "the error file names classes that no longer exist"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("x"), 2),
        (GateFailed("validate", [Gate(name="AP drop", value=1.4, limit=0.3, passed=False)]), 3),
        (Unavailable("x"), 4),
        (RunLocked("x"), 4),
        (NoSpaceLeft("x"), 4),
        (ArtifactError("x"), 5),
        (PipelineError("x"), 1),
        (KeyboardInterrupt(), 130),
        (Interrupted("x"), 130),
        (Terminated("x"), 143),
        (ValueError("x"), None),
        (OSError(errno.EACCES, "x"), None),
        (OSError(errno.ENOSPC, "x"), 4),
        (OSError(errno.EFBIG, "x"), 4),
        (OSError(errno.EDQUOT, "x"), 4),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), 4),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), 4),
        (RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"), None),
    ],
)
def test_each_error_has_its_exit_code(error: BaseException, code: int | None) -> None:
    assert exit_code_of(error) == code


def test_a_leaf_exception_brings_its_own_exit_code() -> None:
    class EngineUnavailable(RuntimeError):
        exit_code = 4

    assert exit_code_of(EngineUnavailable("no GPU")) == 4
    assert message_of(EngineUnavailable("no GPU")) == "no GPU"


def test_a_gate_failure_says_what_was_found_and_what_is_allowed() -> None:
    gates = [
        Gate(name="AP drop, TensorRT", value=1.4, limit=0.3, passed=False, reason="see parity.json"),
        Gate(name="unmatched boxes", value=2, limit=0, passed=False),
    ]
    assert str(GateFailed("validate", gates)) == (
        "validate failed 2 gates: AP drop, TensorRT is 1.4, limit 0.3 (see parity.json); unmatched boxes is 2, limit 0"
    )


def test_no_space_is_found_behind_other_exceptions_and_names_its_file(tmp_path: Path) -> None:
    def write() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "deep" / "model.onnx"))
        except OSError as error:
            raise RuntimeError("saving failed") from error

    with pytest.raises(RuntimeError) as caught:
        write()
    assert is_no_space(caught.value)
    message = message_of(caught.value)
    assert message.startswith(f"no space left: writing to {tmp_path / 'deep' / 'model.onnx'} failed (")
    assert "GB free on that file system" in message
    assert "the same command" in message


def test_an_error_raised_from_none_does_not_inherit_what_it_hides() -> None:
    with pytest.raises(ValueError, match="other") as caught:
        _hide()
    assert exit_code_of(caught.value) is None


def _hide() -> None:
    try:
        raise OSError(errno.ENOSPC, "full")
    except OSError:
        raise ValueError("other") from None


LIMITED = """
    import resource, signal, sys
    from pathlib import Path
    from rich.console import Console
    from pipeline.errors import exit_code_of, message_of
    from pipeline.recipe import Recipe
    from pipeline.run import run_stages
    from pipeline.stage import Stage, StageResult

    writer, run_dir, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

    def run(context):
        path = context.directory / "big"
        if writer == "torch":
            import torch
            torch.save(torch.zeros(1_000_000), path)
        else:
            with path.open("wb") as file:
                file.write(bytes(4_000_000))
        return StageResult()

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    stage = Stage(name="train", version=1, inputs=(), config_sections=(), run=run)
    try:
        run_stages([stage], Recipe(name="toy", path=Path("toy.py")), run_dir, console=Console(stderr=True))
    except Exception as error:
        print(message_of(error))
        sys.exit(exit_code_of(error))
"""


def _run_limited(writer: str, run_dir: Path, limit: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(LIMITED), writer, str(run_dir), str(limit)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("writer", ["python", "torch"])
def test_a_stage_that_finds_no_space_left_ends_with_4_names_its_folder_and_leaves_nothing(
    tmp_path: Path, writer: str
) -> None:
    limited = _run_limited(writer, tmp_path / "run", 100_000)
    assert limited.returncode == 4, limited.stdout + limited.stderr
    assert "no space left" in limited.stdout
    assert str(tmp_path / "run" / "train") in limited.stdout
    assert "files are limited to 100000 bytes" in limited.stdout
    assert not list((tmp_path / "run").glob("train*"))
    again = _run_limited(writer, tmp_path / "run", 0)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "train" / "manifest.json").is_file()
