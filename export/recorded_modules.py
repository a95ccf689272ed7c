"""What the modules of a detector and of its export graph read and make, in the order of execution."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from torch import Tensor, nn

from export.departure import Departure
from export.graph_values import distance

TOLERANCE = 1e-4  # of a tensor's largest magnitude


class Record(NamedTuple):
    """A tensor that a module reads or makes; ``module`` is its name in the detector."""

    module: str
    operator: str
    tensor: Tensor


def shared_parts(module: nn.Module) -> dict[str, nn.Module]:
    """The backbone and the dense head of a detector, or of its export graph."""
    if isinstance(module, GeneralizedRCNN):
        head = module.proposal_generator.rpn_head
    else:
        head = module.proposals.head if hasattr(module, "proposals") else module.head
    return {"backbone": module.backbone, "head": head}


def recorded(parts: Mapping[str, nn.Module], run: Callable[[], Any]) -> tuple[dict[str, Record], Any]:
    """What goes into each part and what its modules make, in the order of execution, and what ``run`` returns."""
    records: dict[str, Record] = {}

    def keep(name: str, module: nn.Module, what: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            number = sum(key.startswith(f"{what} of {name}, ") for key in records)
            # A copy, because detectron2 computes in place.
            records[f"{what} of {name}, {number}"] = Record(name, type(module).__name__, tensor.detach().clone())

    with contextlib.ExitStack() as hooks:
        for part, module in parts.items():
            before = module.register_forward_pre_hook(
                lambda module, arguments, part=part: keep(part, module, "input", _tensors(arguments))
            )
            hooks.callback(before.remove)
            for name, inner in module.named_modules(prefix=part):
                after = inner.register_forward_hook(
                    lambda inner, _, made, name=name: keep(name, inner, "output", _tensors(made))
                )
                hooks.callback(after.remove)
        with torch.inference_mode():
            result = run()
    return records, result


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors of floating point in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def first_module(reference: Mapping[str, Record], candidate: Mapping[str, Record]) -> Departure | None:
    before = "the canvas"
    for key, record in reference.items():
        other = candidate.get(key)
        if other is None:
            missing = "the graph has no such tensor: a level of the pyramid is left out, or a module is not run"
            return departure_at(record, before, key, None, missing)
        error = distance(other.tensor.cpu().numpy(), record.tensor.cpu().numpy())
        if error is None or error > TOLERANCE:
            return departure_at(record, before, key, other.tensor, _advice(key, record.tensor, other.tensor))
        before = key
    return None


def departure_at(record: Record, reads: str, makes: str, found: Tensor | None, reason: str) -> Departure:
    expected = record.tensor
    comparable = found is not None and found.shape == expected.shape
    return Departure(
        node="normalised image" if makes.startswith("input of backbone") else record.module,
        operator=record.operator,
        reads=(reads,),
        makes=makes,
        module=record.module,
        max_abs_error=float((found - expected).abs().max()) if found is not None and comparable else None,
        max_abs_value=float(expected.abs().max()),
        reason=reason,
    )


def _advice(key: str, expected: Tensor, found: Tensor) -> str:
    if found.shape != expected.shape:
        return f"the graph makes {tuple(found.shape)} and detectron2 {tuple(expected.shape)}"
    if not key.startswith("input of backbone"):
        kind = "what goes in" if key.startswith("input") else "what comes out"
        return f"{kind} differs: look at which features of the backbone the graph passes on, and at the module's state"
    means = ["/".join(f"{v:.3g}" for v in t.mean(dim=(0, 2, 3)).tolist()) for t in (found, expected)]
    return (
        "the image that goes into the backbone differs: look at mean, standard deviation and channel order; the means "
        f"of the channels are {means[0]} in the graph and {means[1]} in detectron2"
    )


@contextlib.contextmanager
def kept_output(module: nn.Module) -> Iterator[list[Any]]:
    """What a module returns, call by call."""
    made: list[Any] = []
    hook = module.register_forward_hook(lambda module, _, output: made.append(output))
    try:
        yield made
    finally:
        hook.remove()
