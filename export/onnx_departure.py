"""The first node of an ONNX file that departs from a reference of the same detector.

Two files of one export name their values alike, so a value is compared with the one of its name; a value that only the
file has, or any value where the two are of different exports, is right if any of the reference's is equal to it. From
the graph's outputs that are wrong the search goes back through what is wrong, to the nodes that read nothing wrong. So
a node that was added and changes nothing, or whose effect is undone again, is not found; a changed constant is found
at the node that reads it; a node inside a loop as the loop.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx.numpy_helper
from onnx import ModelProto, NodeProto

from export.departure import Departure
from export.float32_tail import tail_of
from export.graph_values import Failure, Values, constants_of, distance, makers_of, values_of
from export.trunk import TRUNK_PREFIX, inputs_of, subgraphs_of, trunk_nodes

TOLERANCE = 1e-4  # of a value's largest magnitude
_SCOPES, _STACK = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.stack_trace"
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_IN_TORCH = re.compile(r"(^|/)torch/|^<")
_ROOT = re.compile(rf"^(.*/site-packages/|{re.escape(str(Path(__file__).parents[1]))}/)")
_NO_NODE = "ONNX Runtime does not load it"


def onnx_departure(suspect: ModelProto, reference: ModelProto, feeds: Mapping[str, np.ndarray]) -> Departure | None:
    """Run both and find the first node of ``suspect`` that departs; None: the outputs agree.

    Args:
        suspect: a file of the detector.
        reference: the same detector as it should be, from :func:`export.targets.onnx_target.traced_onnx` for modules
            and lines to be known.
        feeds: the graph's input by name.

    Raises:
        ReferenceFails: the reference itself does not run.
    """
    found, failure = values_of(suspect, feeds)
    return _Comparison(suspect, found, reference, _reference_values(reference, feeds)).first(failure, _batch(feeds))


def tail_departure(converted: ModelProto, exported: ModelProto, feeds: Mapping[str, np.ndarray]) -> Departure | None:
    """The first node after the trunk of a converted file that departs from the exported file's on the same values.

    None: their outputs agree, so what the conversion lost, it lost in the trunk (:func:`trunk_departure`).
    """
    tail = tail_of(exported)
    found, failure = values_of(converted, feeds)
    made = {value.name: found[value.name] for value in tail.graph.input if value.name in found}
    missing = [value.name for value in tail.graph.input if value.name not in made and value.name not in feeds]
    if missing:
        reason = failure.message if failure else "the converted file has no values of these names"
        return Departure(
            node=missing[0], operator="-", reads=(), makes=", ".join(missing), batch_size=_batch(feeds), reason=reason
        )
    given = {**feeds, **{name: value.astype(np.float32) for name, value in made.items()}}
    return _Comparison(converted, found, tail, _reference_values(tail, given)).first(failure, _batch(feeds))


def trunk_departure(converted: ModelProto, exported: ModelProto, feeds: Mapping[str, np.ndarray]) -> Departure | None:
    """The node of the exported file at which the converted one loses most: where the relative error grows most.

    Every node of a lower precision departs, so this is no fault by itself. None: no value has kept its name.
    """
    found, _ = values_of(converted, feeds)
    expected = _reference_values(exported, feeds)
    errors: dict[str, float] = {}
    growth: dict[str, tuple[float, NodeProto]] = {}
    for node in trunk_nodes(exported.graph):
        before = max((errors.get(name, 0.0) for name in inputs_of(node)), default=0.0)
        for name in node.output:
            error = _relative_error(found.get(TRUNK_PREFIX + name, found.get(name)), expected[name])
            errors[name] = before if error is None else error
            if error is not None:
                growth[name] = (error - before, node)
    if not growth:
        return None
    name, (grown, node) = max(growth.items(), key=lambda item: item[1][0])
    module, source = _origin_in_code(node)
    return Departure(
        node=node.name, operator=node.op_type, reads=tuple(node.input), makes=name, module=module, source=source,
        max_abs_value=float(np.abs(expected[name]).max()), batch_size=_batch(feeds),
        reason=f"decoding and NMS are right and the trunk loses most here: the relative error grows by {grown:.3g} to "
        f"{errors[name]:.3g} (root mean square); keep this layer in float32, or calibrate on more images",
    )  # fmt: skip


class ReferenceFails(RuntimeError):
    """ONNX Runtime does not run what a file is compared with."""

    exit_code = 3


def _reference_values(reference: ModelProto, feeds: Mapping[str, np.ndarray]) -> Values:
    expected, failure = values_of(reference, feeds)
    if failure is not None:
        raise ReferenceFails(f"bisect: ONNX Runtime does not run what the file is compared with: {failure.message}")
    return {**constants_of(reference), **expected, **feeds}


def _batch(feeds: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(feeds.values())))


def _relative_error(value: np.ndarray | None, expected: np.ndarray) -> float | None:
    if value is None or value.shape != expected.shape or expected.dtype.kind != "f":
        return None
    reference = expected.astype(np.float64)
    scale = float(np.sqrt((reference**2).mean())) if reference.size else 0.0
    return float(np.sqrt(((value.astype(np.float64) - reference) ** 2).mean())) / scale if scale else None


class _Comparison:
    """A file and what its nodes make, beside a reference and its values."""

    def __init__(self, suspect: ModelProto, found: Values, reference: ModelProto, expected: Values) -> None:
        self._suspect, self._found, self._reference, self._expected = suspect, found, reference, expected
        self._makers = makers_of(suspect)
        self._constants = constants_of(suspect)
        self._nodes = {(node.name, node.op_type): node for node in reference.graph.node}
        by_shape: dict[tuple[int, ...], list[np.ndarray]] = {}
        for value in expected.values():
            by_shape.setdefault(value.shape, []).append(value)
        self._by_shape = by_shape
        same = sum(self._counterpart(node) is not None for node in suspect.graph.node)
        self._named_alike = 2 * same > len(reference.graph.node)

    def first(self, failure: Failure | None, batch_size: int) -> Departure | None:
        """The first node that departs; the one that fails, where it reads nothing wrong."""
        if failure is not None and failure.node is None:
            return Departure(
                node=_NO_NODE, operator="-", reads=(), makes="-", batch_size=batch_size, reason=failure.message
            )
        if failure is None:
            start = [output.name for output in self._suspect.graph.output if not self._agrees(output.name)]
        else:
            node = next(node for node in self._suspect.graph.node if node.name == failure.node)
            start = [node.output[0]]
        found = self._origins(start)
        if not found:
            return None
        return self._departure(found[0], [node.name for node in found[1:]], failure, batch_size)

    def _origins(self, wrong: list[str]) -> list[NodeProto]:
        """The nodes that make something wrong of nothing wrong, in the graph's order."""
        seen, origins, waiting = set(), set(), list(wrong)
        while waiting:
            name = waiting.pop()
            node = self._makers[name]
            if node.output[0] in seen:
                continue
            seen.add(node.output[0])
            before = [read for read in inputs_of(node) if read in self._makers and not self._agrees(read)]
            waiting += before
            if not before:
                origins.add(node.output[0])
        return [node for node in self._suspect.graph.node if node.output[0] in origins]

    def _agrees(self, name: str) -> bool:
        value = self._found.get(name)
        if value is None:  # of the node that fails
            return False
        if self._named_alike and name in self._expected:
            return _equal(value, self._expected[name])
        return any(_equal(value, other) for other in self._by_shape.get(value.shape, ()))

    def _counterpart(self, node: NodeProto) -> NodeProto | None:
        return self._nodes.get((node.name, node.op_type))

    def _departure(self, node: NodeProto, others: list[str], failure: Failure | None, batch: int) -> Departure:
        wrong = next((name for name in node.output if name and not self._agrees(name)), node.output[0])
        value, expected = self._found.get(wrong), self._expected.get(wrong)
        error = scale = None
        if value is not None and expected is not None and value.shape == expected.shape:
            error = float(np.abs(value.astype(np.float64) - expected).max(initial=0))
            scale = float(np.abs(expected.astype(np.float64)).max(initial=0))
        known = self._counterpart(node) or self._neighbour(node)
        module, source = _origin_in_code(known) if known is not None else ("", "")
        reasons = list(self._differences(node, wrong))
        if failure is not None and failure.node == node.name:
            reasons.append(f"ONNX Runtime does not run it in a batch of {batch}: {failure.message}")
        return Departure(
            node=node.name,
            operator=node.op_type,
            reads=tuple(name for name in node.input if name),
            makes=wrong,
            module=module,
            source=source,
            max_abs_error=error,
            max_abs_value=scale,
            batch_size=batch,
            reason="; ".join(reasons) or "the same operator, attributes, inputs and constants give another result here",
            others=tuple(others),
        )

    def _neighbour(self, node: NodeProto) -> NodeProto | None:
        """Of a node that the reference does not have: the one that makes the same value there, or reads its input."""
        by_name = makers_of(self._reference).get(node.output[0])
        reads = set(node.input)
        others = (other for other in self._reference.graph.node if other.op_type != "Shape")
        return by_name or next((other for other in others if reads & set(other.input)), None)

    def _differences(self, node: NodeProto, wrong: str) -> Iterator[str]:
        """What tells the node from its counterpart in the reference."""
        other = self._counterpart(node)
        if other is None:
            yield "a fresh export has no such node"
        elif list(node.input) != list(other.input):
            yield f"a fresh export reads {', '.join(name for name in other.input if name)} here"
        ours = self._constants | _inner_constants(node)
        theirs = self._expected | (_inner_constants(other) if other is not None else {})
        for name in dict.fromkeys([*inputs_of(node), *_inner_constants(node)]):
            if name in ours and not (name in theirs and np.array_equal(ours[name], theirs[name], equal_nan=True)):
                expected = f", {_brief(theirs[name])} in a fresh export" if name in theirs else ""
                if other is not None or expected:
                    yield f"its constant {name!r} is {_brief(ours[name])}{expected}"
        if other is not None and _attributes(node) != _attributes(other):
            yield f"attributes {_attributes(node)}, in a fresh export {_attributes(other)}"
        value, expected_value = self._found.get(wrong), self._expected.get(wrong)
        if value is not None and value.dtype in (np.float16, np.float64):
            yield f"computes in {value.dtype}, not in float32"
        if value is not None and expected_value is not None and value.shape != expected_value.shape:
            yield f"the result has shape {value.shape}, in a fresh export {expected_value.shape}"


def _equal(value: np.ndarray, reference: np.ndarray) -> bool:
    if reference.dtype.kind != "f":
        return value.shape == reference.shape and np.array_equal(value, reference)
    error = distance(value, reference)
    return error is not None and error <= TOLERANCE


def _inner_constants(node: NodeProto) -> Values:
    return {t.name: onnx.numpy_helper.to_array(t) for graph in subgraphs_of(node) for t in graph.initializer}


def _attributes(node: NodeProto) -> dict[str, object]:
    simple = (a for a in node.attribute if a.type not in (a.GRAPH, a.TENSOR))
    return {a.name: onnx.helper.get_attribute_value(a) for a in sorted(simple, key=lambda a: a.name)}


def _brief(value: np.ndarray) -> str:
    """The first numbers of a tensor."""
    numbers = ", ".join(f"{number:.6g}" for number in value.flatten()[:4].tolist())
    return f"[{numbers}{', …' if value.size > 4 else ''}]"


def _origin_in_code(node: NodeProto) -> tuple[str, str]:
    """Module of the detector and line of code that torch's exporter notes on a node; empty where it does not."""
    notes = {note.key: note.value for note in node.metadata_props}
    try:
        scopes = [str(name) for name in ast.literal_eval(notes.get(_SCOPES, "[]"))]
    except (SyntaxError, ValueError):
        scopes = []
    module = next((name for name in reversed(scopes[:-1]) if name), "").removeprefix("detector.")
    frames = [frame for frame in _FRAME.findall(notes.get(_STACK, "")) if not _IN_TORCH.search(frame[0])]
    return module, f"{_ROOT.sub('', frames[-1][0])}, line {frames[-1][1]}" if frames else ""
