"""Check, before anything is installed, what only the system can give. Runs in any Python 3, standard library only."""

import ctypes
import platform
import sys

SUPPORTED = ((3, 11), (3, 12))


def problems():
    """What is missing, one sentence each, with what to do."""
    version = sys.version_info[:2]
    name = f"{version[0]}.{version[1]}"
    if version not in SUPPORTED:
        yield (
            f"Python {name} is not supported, expected 3.11 or 3.12: the pinned wheels and Triton's Python backend are "
            "made for these. Install one and give it, e.g. `make PYTHON=python3.11 test`."
        )
        return
    if sys.platform != "linux" or platform.machine() != "x86_64":
        yield (
            f"{sys.platform} on {platform.machine()} is not supported, expected Linux on x86_64: tritonserver is built "
            "for it."
        )
    library = f"libpython{name}.so.1.0"
    try:
        ctypes.CDLL(library)
    except OSError:
        yield (
            f"the shared library {library} is missing; Triton's Python backend needs it. "
            f"Install it: apt-get install -y libpython{name} (as root; on Fedora: dnf install python{name}-libs)."
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        yield (
            f"Python {name} cannot make virtual environments. Install what it lacks: apt-get install -y "
            f"python{name}-venv (as root)."
        )


if __name__ == "__main__":
    found = list(problems())
    for problem in found:
        sys.stderr.write(f"{problem}\n")
    sys.exit(4 if found else 0)
