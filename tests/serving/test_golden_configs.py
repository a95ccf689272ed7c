"""The golden configurations in model_repository/ are what the code writes today; `make golden` changes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from serving.model_config import MODEL_FILE_OF_BACKEND, ModelConfig
from serving.model_repository import publish
from serving.servers import SERVERS
from tests.golden.make_model_repository import SIGNATURE, golden_configs
from tests.serving.pixel_means import NUM_SLOTS, needs_tritonserver, write_pixel_means_model

REPOSITORY = Path(__file__).parents[2] / "model_repository"


@pytest.mark.parametrize("name", list(golden_configs()))
def test_the_golden_config_is_what_the_code_writes(name: str) -> None:
    text = (REPOSITORY / name / "config.pbtxt").read_text()
    assert text == golden_configs()[name].to_pbtxt(), "run `make golden` and read the diff"
    assert ModelConfig.from_pbtxt(text).name == name


def test_there_is_one_golden_config_for_each_backend_and_no_other() -> None:
    folders = {path.parent.name for path in REPOSITORY.glob("golden_*/config.pbtxt")}
    assert folders == set(golden_configs())
    assert folders == {f"golden_{backend}" for backend in MODEL_FILE_OF_BACKEND}


@pytest.mark.server
@needs_tritonserver
def test_the_golden_config_of_the_python_backend_loads(tmp_path: Path) -> None:
    model = write_pixel_means_model(tmp_path / "model.onnx", dataclasses.replace(SIGNATURE, max_detections=NUM_SLOTS))
    repository = tmp_path / "repository"
    publish(
        repository, model_name="golden_python", model_file=model, signature=SIGNATURE, backend="python", provenance={}
    )
    golden = (REPOSITORY / "golden_python" / "config.pbtxt").read_text()
    (repository / "golden_python" / "config.pbtxt").write_text(golden)
    with SERVERS["wheel"].start(repository, ["golden_python"], log_path=tmp_path / "log") as server:
        assert server.is_running()
