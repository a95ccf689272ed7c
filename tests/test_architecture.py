"""The shape of the project: who imports whom, what modules may be called, how large they may be."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.model_repository import BACKEND_FILES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "training", "export", "serving")

# Longest prefix wins: what the modules below it may import of this project, besides modules below the same prefix.
ARROWS = {
    "pipeline": ("training", "export", "serving"),
    "training": (),
    "training.detectors": (),
    "training.backbones": (),
    "export": ("training.detectors", "training.backbones"),
    "serving": ("export.signature", "export.candidate_nms", "export.engine_session"),
    "serving.backends": (),
}
# Modules with these names would hide, or be hidden by, a library.
LIBRARY_NAMES = {
    "onnx", "onnxruntime", "onnxscript", "triton", "tritonclient", "torch", "torchvision", "numpy", "tensorrt",
    "tensorrt_rtx", "timm", "rich", "typer", "jinja2", "psutil", "filelock", "detectron2", "pytest", "matplotlib",
} | set(sys.stdlib_module_names)  # fmt: skip
FORBIDDEN_NAMES = {
    "utils",
    "util",
    "helpers",
    "helper",
    "misc",
    "common",
    "manager",
    "managers",
    "factory",
    "factories",
}


def _modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, lazily or not; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                yield str(argument.value)


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _forbidden(module: str, imported: str) -> bool:
    """True when the arrows do not allow ``module`` to import ``imported``."""
    if imported.split(".")[0] not in PACKAGES:
        return False
    owner = max((prefix for prefix in ARROWS if _below(module, prefix)), key=len)
    return not any(_below(imported, prefix) for prefix in (owner, *ARROWS[owner]))


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_imports_follow_the_arrows(path: Path) -> None:
    wrong = [name for name in _imports(ast.parse(path.read_text())) if _forbidden(_name(path), name)]
    assert not wrong, f"{_name(path)} may not import {wrong}"


def test_the_arrows_are_what_the_design_draws() -> None:
    assert _forbidden("serving.client", "pipeline.run")
    assert _forbidden("serving.client", "export.runners.Runner")
    assert _forbidden("training.train", "export.signature")
    assert _forbidden("training.detectors.atss_matcher", "training.dataset")
    assert _forbidden("export.parity", "training.distillers.lgd")
    assert _forbidden("serving.backends.onnxruntime_backend.model", "export.signature")
    assert not _forbidden("export.detector_graph", "training.detectors.atss_matcher.AtssMatcher")
    assert not _forbidden("serving.client", "export.signature.Detections")
    assert not _forbidden("pipeline.stages", "training.train.train")
    assert not _forbidden("export.parity", "torch.nn")


def test_tests_and_benchmarks_are_imported_by_no_package() -> None:
    for path in _modules():
        wrong = [name for name in _imports(ast.parse(path.read_text())) if name.split(".")[0] in ("tests", "bench")]
        assert not wrong, f"{_name(path)} imports {wrong}"


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_resolves_to_this_checkout(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / package / "__init__.py"


def test_no_module_is_named_like_a_library_or_after_nothing() -> None:
    for path in _modules():
        name = _name(path).split(".")[-1]
        # Inside a package only the script folder or a relative import could be confused; top level names are fixed.
        assert name not in LIBRARY_NAMES, f"{path} has the name of a library"
        assert name not in FORBIDDEN_NAMES, f"{path}: name it after what it does"


def test_no_shell_and_no_getenv() -> None:
    for path in _modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "shell":
                assert isinstance(node.value, ast.Constant), path
                assert not node.value.value, f"{path}:{node.value.lineno} uses shell=True"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("os.system", "os.popen", "os.getenv"), f"{path}:{node.lineno}"


def test_modules_have_at_most_300_lines() -> None:
    long = {_name(path): n for path in _modules() if (n := len(path.read_text().splitlines())) > 300}
    assert not long


def test_there_is_no_init_file_under_tests() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_serving_and_the_signature_import_without_torch() -> None:
    names = [_name(path) for path in _modules() if _below(_name(path), "serving")]
    names = [name for name in names if not _below(name, "serving.backends")]
    code = f"""
import importlib, sys
for name in {[*names, "export.signature", "export.candidate_nms", "export.engine_session"]}:
    importlib.import_module(name)
print([name for name in ("torch", "detectron2", "training", "pipeline") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_a_backend_model_imports_only_what_triton_has_and_what_lies_beside_it() -> None:
    there = {"python": {"onnxruntime"}, "python_tensorrt": {"cuda"}}  # and TensorRT, by the name in the engine's record
    for backend, files in BACKEND_FILES.items():
        beside = {path.stem for path in files}
        allowed = {"numpy", "triton_python_backend_utils"} | there[backend] | beside | set(sys.stdlib_module_names)
        for path in files:
            roots = {name.split(".")[0] for name in _imports(ast.parse(path.read_text()))}
            assert roots <= allowed, f"{path} imports {sorted(roots - allowed)}"
    copied = {path for files in BACKEND_FILES.values() for path in files}
    assert set((ROOT / "serving" / "backends").rglob("*.py")) <= copied, "what is not copied cannot be found by Triton"
