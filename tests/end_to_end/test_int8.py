"""The whole pipeline in int8 on a tiny recipe; what stands in for ModelOpt writes TensorRT's file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from export import precision as conversion
from pipeline.__main__ import main

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
NEEDING_A_GPU = ("ONNX Runtime, TensorRT provider", "TensorRT")
RECIPE = ROOT / "tests" / "pipeline" / "tiny_recipe.py"
OVERRIDES = (
    "export.precision=int8",
    "export.num_calibration_images=12",
    "parity.min_ap_share_quantized=0",  # four iterations leave an AP of which a hundredth is nothing
    "serving.model_name=tiny_fp32",
    "serving.device=cpu",
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "MODELOPT", ROOT / "tests" / "stand_in")
        patch.setattr(sys, "argv", ["pipeline", "run", str(RECIPE), *OVERRIDES, "--runs", str(runs)])
        with pytest.raises(SystemExit) as ending:
            main()
    assert ending.value.code in (0, None)
    return runs / RECIPE.stem


def facts(run_dir: Path, stage: str) -> Any:
    return json.loads((run_dir / stage / "manifest.json").read_text())["facts"]


def test_both_int8_files_are_measured_and_the_engine_is_built_from_tensorrts(run_dir: Path) -> None:
    rows = {row["name"]: row for row in facts(run_dir, "validate")["rows"] + facts(run_dir, "deploy")["rows"]}
    assert list(rows) == [
        "detectron2",
        "torch, fixed canvas",
        "torch, export graph",
        "ONNX Runtime",
        "ONNX Runtime, int8 (CPU)",
        "ONNX Runtime, int8 (TensorRT's file)",
        "ONNX Runtime, TensorRT provider",
        "TensorRT",
        "Triton, concurrency 1",
        "Triton, concurrency 8",
    ]
    assert all(row["status"] == "passed" for name, row in rows.items() if name not in NEEDING_A_GPU)
    assert {rows[name]["compared_with"] for name in rows if "int8" in name} == {"ONNX Runtime"}
    assert rows["Triton, concurrency 1"]["compared_with"] == "ONNX Runtime, int8 (CPU)"
    heads = facts(run_dir, "validate")["head_tensors"]
    assert {head["compared_with"] for head in heads if "int8" in head["rung"]} == {"ONNX Runtime"}
    engine = facts(run_dir, "engine")
    assert (engine["precision"], engine["status"]) == ("int8", "built")
    assert engine["layers_by_dtype"]["INT8"] > 50


def test_the_endpoint_serves_the_file_made_for_cpus(run_dir: Path) -> None:
    assert facts(run_dir, "deploy")["model_name"] == "tiny_int8"
    served = run_dir / "model_repository" / "tiny_int8" / "1" / "model.onnx"
    assert served.read_bytes() == (run_dir / "precision" / "model_cpu.onnx").read_bytes()
    assert facts(run_dir, "benchmark")["status"] == "measured"
    assert facts(run_dir, "precision")["files"]["model_cpu.onnx"]["layers_by_type"]["INT8"] > 30


def test_the_report_says_what_the_precision_was_made_of(run_dir: Path) -> None:
    report = json.loads((run_dir / "report" / "report.json").read_text())
    assert [file["name"] for file in report["precision"]["files"]] == ["model.onnx", "model_cpu.onnx"]
    assert report["precision"]["files"][0]["num_calibration_images"] == 12
