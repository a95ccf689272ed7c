"""TensorRT's timing cache: what its builder measured of each layer, kept for the next build of the run.

TensorRT-RTX has none (its builder measures nothing; "timing cache operations are no-ops" since 1.2). A cache is valid
for one version and one kind of GPU; TensorRT itself says whether it takes one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

TIMING_CACHE = "timing.cache"


def use_timing_cache(trt: Any, config: Any, previous: Path | None) -> str:
    """Give the build a timing cache, filled with the previous one's measurements where there is a usable one.

    Args:
        config: TensorRT's builder configuration.
        previous: file that :func:`keep_timing_cache` wrote at an earlier build, if any.

    Returns:
        What was done, in words. No file makes a build fail: one that cannot be used is ignored, and this says why.
    """
    if trt.__name__ == "tensorrt_rtx":
        return "none: TensorRT-RTX measures nothing while it builds"
    said = "began empty"
    if previous is not None and previous.is_file():
        try:
            # False: refused unless version and GPU are those of the file.
            cache = config.create_timing_cache(previous.read_bytes())
            if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
                return f"went on from the one of {previous.stat().st_size} bytes of the build before"
            said = "began empty: warning: the one of the build before is damaged or of another version or GPU"
        except (OSError, RuntimeError, ValueError) as error:
            said = f"began empty: warning: the one of the build before cannot be used ({error})"
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return said


def keep_timing_cache(trt: Any, config: Any, path: Path) -> None:
    """Write what the build measured; nothing for TensorRT-RTX."""
    if trt.__name__ == "tensorrt_rtx":
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(config.get_timing_cache().serialize())
    os.replace(partial, path)
