"""Run a server so that it cannot outlive the process that asked for it, not even after ``kill -9``.

A script of its own (``python supervise.py PARENT_PID SCRATCH -- COMMAND...``), standard library only. The server gets
its own process group and dies with this supervisor (``PR_SET_PDEATHSIG``); the supervisor stops it on SIGTERM or SIGINT
and when its parent is gone, first gently, then with SIGKILL to the whole group, and removes the scratch directory.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time

GENTLE_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def main() -> int:
    parent, scratch = int(sys.argv[1]), sys.argv[2]
    command = sys.argv[4:]
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: stopping.append(number))
    server = subprocess.Popen(
        command,
        start_new_session=True,
        # This process has one thread, so preexec_fn is safe here, as it would not be in the pipeline.
        preexec_fn=lambda: die_with_parent(signal.SIGKILL),
    )
    try:
        while server.poll() is None and not stopping and os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        if server.poll() is None:
            server.terminate()
            try:
                server.wait(GENTLE_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            else:
                return 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # the server, or backend processes that outlived it
        shutil.rmtree(scratch, ignore_errors=True)
    status = server.wait()
    return status if status >= 0 else 128 - status  # ended by a signal: the number a shell would give


def die_with_parent(number: int) -> None:
    """Let the kernel send this process a signal when its parent ends, however that ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)


if __name__ == "__main__":
    sys.exit(main())
