"""Every error a user can meet, and the exit code that goes with it.

    PipelineError                             1
    ├─ Interrupted                          130   Ctrl-C; the same command goes on
    │  └─ Terminated                        143   SIGTERM
    ├─ RecipeError                            2   the recipe or an override is wrong
    ├─ GateFailed                             3   a number is outside its limit
    ├─ Unavailable                            4   this machine lacks something the run needs
    │  ├─ RunLocked                           4   another run works in the same folder
    │  ├─ TrainingProcessLost                 4   a process of a launched training was killed
    │  └─ NoSpaceLeft                         4   disk full, quota or file-size limit reached
    └─ ArtifactError                          5   an artifact is missing or damaged

The leaf packages cannot import this module. What a user can meet there is an exception with a class attribute
``exit_code``; it is drawn here and stays in the module that raises it (a test compares the two):

    training.dataset_config.DatasetError                2   the annotations or the images they name are wrong
    training.distillers.lgd.objects.LgdInputError       2   the recipe, labels or pyramid do not fit the distiller
    training.embedded_sources.EmbeddedSourceMissing     4   a package that the embedded data set needs is missing
    training.detection_losses.UnsupportedStudent        2   the detector has no losses on given features
    training.loader.TrainingInputError                  2   the data set leaves nothing to train on
    training.divergence.LossNotFinite                   3   training diverged
    training.train.StudentUnsuited                      2   the student's pyramid cannot be distilled
    training.launch.LaunchError                         2   the processes do not fit the batch or the machine
    training.evaluate.DeviceUnavailable                 4   the recipe asks for a GPU that is not there
    training.acceleration.CompilerMissing               4   the recipe compiles and there is no compiler
    training.tracking.TrackerMissing                    4   the recipe logs to a tracker that is not installed
    training.checkpoint.CheckpointDamaged               5   a checkpoint cannot be read
    training.backbones.timm_backbone.UnsupportedBackbone 2   no such timm model, or it cannot be a backbone
    training.backbones.weight_file.WeightsUnusable      2   pretrained weights are missing or of another network
    export.detector_graph.UnsupportedDetector           2   the detector has no export graph
    export.onnx_departure.ReferenceFails                3   ONNX Runtime does not run what a file is compared with
    export.runners.RunFailed                            3   a model does not run a batch that its signature promises
    export.targets.tensorrt_target.UnsupportedEngine    2   the recipe asks for an engine that cannot be built
    export.deformable_sampling.UnsupportedDeformConv    2   a deformable convolution has no form for TensorRT
    export.precision.ModelOptMissing                    4   NVIDIA ModelOpt, which makes the precision, is not installed
    export.precision.TooFewCalibrationImages            2   the training set is smaller than the calibration asked for
    export.precision_audit.PrecisionMismatch            3   layers do not have the precision asked for
    export.providers.ProviderUnavailable                4   ONNX Runtime cannot use a provider on this machine
    export.engine_session.EngineUnavailable             4   no TensorRT, no GPU, or an engine of another GPU or version
    export.engine_session.EngineDamaged                 5   a plan is not the one that was built
    serving.preprocessing.ImageError                    2   an image cannot be read or is gigantic
    serving.client.RequestRefused                       2   the server does not take this model or input
    serving.client.ServerUnreachable                    4   no server answers at the address
    serving.servers.running.ServerError                 4   the server cannot start: a part, a port, a model
    serving.model_repository.RepositoryDamaged          5   a published version was changed

An exception without an exit code is a bug: it is shown with its traceback and ends the process with 1.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.stage import Gate

_NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# torch's and C++ libraries' writers lose the errno; these are the messages of a write that came back short.
_NO_SPACE_MESSAGES = (
    "PytorchStreamWriter failed",
    "unexpected pos",
    "No space left on device",
    "File too large",
    "iostream error",
)


class PipelineError(Exception):
    """Base of the pipeline's own errors; ``str()`` is one paragraph for the user."""

    exit_code = 1


class RecipeError(PipelineError):
    """The recipe, an override or a name on the command line is wrong."""

    exit_code = 2


class GateFailed(PipelineError):
    """At least one number is outside its limit.

    Attributes:
        stage: the stage whose gates failed.
        gates: the gates that failed, at least one.
    """

    exit_code = 3

    def __init__(self, stage: str, gates: Sequence[Gate]) -> None:
        self.stage = stage
        self.gates = tuple(gates)
        found = "; ".join(
            f"{gate.name} is {_number(gate.value)}, limit {_number(gate.limit)}{_because(gate.reason)}"
            for gate in gates
        )
        super().__init__(f"{stage} failed {len(gates)} gate{'s' if len(gates) > 1 else ''}: {found}")


class Unavailable(PipelineError):
    """Hardware, a server, a port or another thing this machine must give is missing."""

    exit_code = 4


class RunLocked(Unavailable):
    """Another process works in the same run folder."""


class NoSpaceLeft(Unavailable):
    """The disk is full, or a quota or file-size limit is reached."""


class TrainingProcessLost(Unavailable):
    """A process of a launched training ended without a word."""


class ArtifactError(PipelineError):
    """An artifact is missing, truncated or changed since it was published."""

    exit_code = 5


class Interrupted(PipelineError):
    """Ctrl-C ended a run. Stages see ``KeyboardInterrupt``, which typer would turn into a return value."""

    exit_code = 130


class Terminated(Interrupted):
    """SIGTERM ended a run."""

    exit_code = 143


def exit_code_of(exception: BaseException) -> int | None:
    """The process exit code for an exception, or None when it is a bug that needs its traceback."""
    if _no_space_cause(exception) is not None:
        return NoSpaceLeft.exit_code
    code = getattr(type(exception), "exit_code", None)
    if isinstance(code, int):
        return code
    return Interrupted.exit_code if isinstance(exception, KeyboardInterrupt) else None


def message_of(exception: BaseException) -> str:
    """One paragraph about an exception: what is wrong, where, and what to do."""
    if isinstance(exception, KeyboardInterrupt):
        return "interrupted; nothing was left half-written"
    cause = _no_space_cause(exception)
    if cause is not None:
        return no_space_message(cause)
    return str(exception) or type(exception).__name__


def is_no_space(exception: BaseException) -> bool:
    """True when the exception, or what led to it, is a write that found no space left."""
    return _no_space_cause(exception) is not None


def no_space_message(exception: BaseException, directory: Path | None = None) -> str:
    """What to tell about a write that found no space left.

    Args:
        exception: any exception for which :func:`is_no_space` holds.
        directory: where the writing happened, for the exceptions that do not name a file.
    """
    cause = _no_space_cause(exception) or exception
    if isinstance(cause, NoSpaceLeft):
        return str(cause)
    filename = getattr(cause, "filename", None)
    where = Path(os.fsdecode(filename)) if isinstance(filename, str | bytes) else directory or Path.cwd()
    existing = next(path for path in (where, *where.absolute().parents) if path.exists())
    facts = [f"{shutil.disk_usage(existing).free / 1e9:.2f} GB free on that file system"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY:
        facts.append(f"files are limited to {limit} bytes, see 'ulimit -f'")
    return (
        f"no space left: writing to {where} failed ({', '.join(facts)}). Free some space or raise the limit, then give "
        "the same command again: finished stages and checkpoints are kept."
    )


def _no_space_cause(exception: BaseException) -> BaseException | None:
    for link in _chain(exception):
        if isinstance(link, NoSpaceLeft):
            return link
        if isinstance(link, OSError) and link.errno in _NO_SPACE_ERRNOS:
            return link
        if isinstance(link, RuntimeError) and any(text in str(link) for text in _NO_SPACE_MESSAGES):
            return link
    return None


def _chain(exception: BaseException) -> Iterator[BaseException]:
    """The exception and what led to it, as a traceback would show it."""
    seen: set[int] = set()
    link: BaseException | None = exception
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""
