"""Facts about the machine are found without importing the libraries they name."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import environment

ROOT = Path(__file__).resolve().parents[2]


def test_the_facts_are_json_and_name_this_machine() -> None:
    facts = environment.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["num_cores"] >= 1
    assert facts["memory_bytes"] > 1e8
    assert facts["cpu"]
    assert facts["versions"]["torch"] == f"torch {importlib.metadata.version('torch')}"
    assert facts["versions"]["detectron2"]


def test_no_gpu_has_a_reason() -> None:
    facts = environment.facts()
    assert bool(facts["gpus"]) != bool(facts["gpu_reason"])


def test_declared_keys_are_a_subset_and_unknown_ones_are_refused() -> None:
    assert environment.declared(["numpy", "gpus"]) == {
        "numpy": f"numpy {importlib.metadata.version('numpy')}",
        "gpus": environment.facts()["gpus"],
    }
    with pytest.raises(ValueError, match="no environment fact 'nunpy'"):
        environment.declared(["nunpy"])


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert environment._commit(tmp_path) == (None, None)


def test_inside_a_checkout_the_commit_and_changes_are_known(tmp_path: Path) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    git = ["git", "-C", str(tmp_path), *identity]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    commit, dirty = environment._commit(tmp_path)
    assert commit is not None
    assert (len(commit), dirty) == (40, False)
    (tmp_path / "a").write_text("2")
    assert environment._commit(tmp_path) == (commit, True)


def test_finding_the_facts_imports_no_heavy_library() -> None:
    heavy = ("torch", "numpy", "onnxruntime", "onnx", "detectron2", "tensorrt_rtx")
    code = f"""
import sys
from pipeline.environment import facts
facts()
print([name for name in {heavy} if name in sys.modules])
"""
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
