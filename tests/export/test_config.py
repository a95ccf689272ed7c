from __future__ import annotations

import pytest

from export.config import ExportConfig


def test_lists_and_numbers_of_an_override_become_the_declared_types() -> None:
    config = ExportConfig(canvas=[320, 256.0], compute_capabilities=[75, "120"], max_edge_pixels=320)  # type: ignore[arg-type]
    assert config.canvas == (320, 256)
    assert config.compute_capabilities == ("75", "120")
    assert hash(config) == hash(
        ExportConfig(canvas=(320, 256), compute_capabilities=("75", "120"), max_edge_pixels=320)
    )


def test_more_canvases_come_as_lists_of_lists() -> None:
    config = ExportConfig(canvases=[[128, 256.0], [64, 64]])  # type: ignore[arg-type,list-item]
    assert config.canvases == ((128, 256), (64, 64))
    assert isinstance(hash(config), int)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"canvases": ((256,),)}, r"export\.canvases is \(\(256,\),\), expected pairs"),
        ({"canvases": ((64, 0),)}, r"export\.canvases"),
        ({"canvases": ((64, 64), (64, 64))}, "each canvas can be there once"),
        ({"canvases": ((256, 256),)}, "each canvas can be there once"),
        ({"canvas": (256,)}, r"export\.canvas is \(256,\)"),
        ({"canvas": (0, 256)}, r"export\.canvas"),
        ({"short_edge_pixels": 400}, "1 <= short edge <= max edge"),
        ({"max_batch_size": 0}, "expected at least 1"),
        ({"min_batch_size": 0}, r"export\.min_batch_size is 0, .* expected 1 <= min <= opt <= max"),
        ({"min_batch_size": 9}, r"export\.min_batch_size is 9, export\.opt_batch_size None and .*max_batch_size 8"),
        ({"min_batch_size": 4, "opt_batch_size": 2}, r"expected 1 <= min <= opt <= max"),
        ({"opt_batch_size": 9}, r"export\.opt_batch_size 9"),
        ({"opt_batch_size": 0}, r"export\.opt_batch_size 0"),
        ({"num_calibration_images": 0}, r"export\.num_calibration_images is 0, expected at least 1"),
    ],
)
def test_nonsense_is_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportConfig(**values)  # type: ignore[arg-type]
