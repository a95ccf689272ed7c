"""Atomic publishing: a stage writes to a partial directory, which takes the artifact's name by a rename.

Renames on the way, with what a kill in between leaves and what :func:`recover` makes of it:

    <stage> -> <stage>.old                 no <stage>: the old artifact gets its name back
    <stage>.partial-<fingerprint> -> <stage>   both: the old one is deleted
    delete <stage>.old
"""

from __future__ import annotations

import shutil
from pathlib import Path


def partial_directory(run_dir: Path, stage: str, fingerprint: str) -> Path:
    """Where a stage writes while it runs."""
    return run_dir / f"{stage}.partial-{fingerprint[:12]}"


def partials(run_dir: Path, stage: str) -> list[Path]:
    """What unfinished runs of a stage have left."""
    return sorted(run_dir.glob(f"{stage}.partial-*"))


def discard_partials(run_dir: Path, stage: str, *, keep: Path | None = None) -> None:
    """Delete what unfinished runs of a stage have left, but for one that goes on."""
    for directory in partials(run_dir, stage):
        if directory != keep:
            shutil.rmtree(directory)


def publish(partial: Path, final: Path) -> None:
    """Give a complete partial directory its name; what had that name is deleted."""
    old = _old(final)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def recover(final: Path) -> None:
    """Undo or finish a publish that was killed in the middle."""
    old = _old(final)
    if not old.exists():
        return
    if final.exists():
        shutil.rmtree(old)
    else:
        old.rename(final)


def _old(final: Path) -> Path:
    return final.with_name(f"{final.name}.old")
