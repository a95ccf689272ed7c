"""One run at a time in a run folder.

The lock is ``flock`` on ``.lock``, so the kernel releases it however the process ends; filelock closes it in forked
workers, so those of a killed run do not hold it. Who holds it stands in a file beside it: ``flock`` does not tell.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from pipeline.errors import RunLocked

LOCK_FILE = ".lock"
HOLDER_FILE = ".lock-holder.json"


@contextlib.contextmanager
def locked(run_dir: Path, command: str) -> Iterator[None]:
    """Hold the lock of a run folder, which is created if need be.

    Args:
        command: told to whoever finds the folder locked.

    Raises:
        RunLocked: another process holds it; names its pid, host and start.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run_dir / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = holder(run_dir)
        told = (
            f"pid {who['pid']} on {who['host']} since {who['started']} ({who['command']})" if who else "another process"
        )
        raise RunLocked(
            f"run locked: {told} works in {run_dir}. Wait until it ends, stop it, or give this run another folder."
        ) from None
    try:
        _write_holder(run_dir, command)
        yield
    finally:
        (run_dir / HOLDER_FILE).unlink(missing_ok=True)
        lock.release()


def holder(run_dir: Path) -> dict[str, Any] | None:
    """Who said last that it holds the lock: pid, host, started, command. It may have been killed since."""
    try:
        who = json.loads((run_dir / HOLDER_FILE).read_text())
    except (OSError, ValueError):
        return None
    return who if isinstance(who, dict) and {"pid", "host", "started", "command"} <= set(who) else None


def _write_holder(run_dir: Path, command: str) -> None:
    who = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }
    (run_dir / HOLDER_FILE).write_text(json.dumps(who))
