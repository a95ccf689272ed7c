"""Make the compact golden vectors of LGD's implicit teacher: `python tests/golden/make_lgd.py [SOURCE]`.

SOURCE holds `reference_context.npz` and `reference_no_context.npz`, recorded from the authors' own code (float32, CPU;
12 MB, so not in this repository). Of each recorded array the compact file keeps a random sample of entries, the entry
of largest magnitude, and the sum of every (height, width) plane, so that a difference anywhere shows. Nothing here is
computed by this project: the compact vectors are as independent of it as the recording is.

The inputs are not stored. Parameters are seeded by their names, and the student's features turn out to be the stream of
`numpy.random.RandomState` from a small seed, level by level; that is verified here before anything is written.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parent / "lgd"
DEFAULT_SOURCE = Path(__file__).parents[3] / "shared" / "golden" / "lgd"
SEEDS = {"context": 1, "no_context": 2}
NUM_SAMPLES = 500


def compact(recorded: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The labels, the seed of the features, and for each result its sample and its sums."""
    stream = np.random.RandomState(seed)
    kept: dict[str, np.ndarray] = {"seed": np.int64(seed)}
    for name, array in recorded.items():
        if name.startswith("student_"):
            if not np.array_equal(stream.standard_normal(array.shape).astype(np.float32), array):
                raise ValueError(f"{name} is not the stream of RandomState({seed}); store it or find its rule.")
            kept[f"{name}/shape"] = np.array(array.shape)
        elif name == "size" or name.startswith(("boxes_", "classes_")):
            kept[name] = array
        else:
            sample = np.random.RandomState(array.size).permutation(array.size)[:NUM_SAMPLES]
            index = np.union1d(sample, np.abs(array).argmax())
            kept[f"{name}/index"] = index.astype(np.int32)
            kept[f"{name}/value"] = array.ravel()[index]
            if array.ndim == 4:
                kept[f"{name}/plane_sums"] = array.sum(axis=(2, 3), dtype=np.float64).astype(np.float32)
                kept[f"{name}/largest_plane"] = np.abs(array).sum(axis=(2, 3), dtype=np.float64).max()
    return kept


def main(source: Path) -> int:
    if not source.is_dir():
        print(f"LGD golden vectors left as they are: no recording in {source}.")  # noqa: T201
        return 0
    for case, seed in SEEDS.items():
        with np.load(source / f"reference_{case}.npz") as recorded:
            # The levels in the order in which their features were drawn.
            kept = compact({name: recorded[name] for name in sorted(recorded.files)}, seed)
        np.savez_compressed(TARGET / f"{case}.npz", **kept)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_SOURCE))
