"""What a build measured serves the next one, and no file can make a build fail."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from export.targets.timing_cache import keep_timing_cache, use_timing_cache

VERSION_AND_GPU = b"10.99 A10:"


class Cache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class Config:
    """TensorRT's builder configuration: it makes no cache of a damaged file and takes none of another GPU."""

    cache: Cache

    def create_timing_cache(self, content: bytes) -> Cache | None:
        return None if content.startswith(b"damaged") else Cache(content or VERSION_AND_GPU)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        if not ignore_mismatch and not cache.content.startswith(VERSION_AND_GPU):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache:
        return self.cache

    def build(self) -> None:
        self.cache.content += b"layer "


class Raising(Config):
    """Bindings that raise where TensorRT gives null."""

    def create_timing_cache(self, content: bytes) -> Cache:
        if content.startswith(b"damaged"):
            raise RuntimeError("null")
        return Cache(content or VERSION_AND_GPU)


TENSORRT: Any = types.SimpleNamespace(__name__="tensorrt")


def test_a_build_goes_on_from_what_the_one_before_measured(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    for number, said in enumerate(("began empty", "went on from the one of 16 bytes", "went on from"), start=1):
        config = Config()
        assert use_timing_cache(TENSORRT, config, path).startswith(said)
        config.build()
        keep_timing_cache(TENSORRT, config, path)
        assert path.read_bytes() == VERSION_AND_GPU + b"layer " * number
    assert [each.name for each in tmp_path.iterdir()] == ["timing.cache"]


@pytest.mark.parametrize("config", [Config(), Raising()])
@pytest.mark.parametrize("content", [b"damaged", b"10.99 T4: layer "])
def test_a_damaged_cache_and_one_of_another_gpu_are_left_out_with_a_warning(
    config: Config, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(content)
    assert use_timing_cache(TENSORRT, config, path).startswith("began empty: warning: ")
    config.build()
    keep_timing_cache(TENSORRT, config, path)
    assert path.read_bytes() == VERSION_AND_GPU + b"layer "


@pytest.mark.parametrize("previous", [None, Path("/nowhere/timing.cache")])
def test_a_first_build_begins_empty_and_without_a_warning(previous: Path | None) -> None:
    assert use_timing_cache(TENSORRT, Config(), previous) == "began empty"
