"""Where a graph departs from what it was made from, as data and in words."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Departure:
    """The first place whose result is another than it should be, although everything that it reads is right.

    Attributes:
        node, operator: an ONNX node and its operator; in torch a module, or what stands for one, and its class.
        reads: names of the values that it reads; in torch what comes before it.
        makes: name of the value that is wrong.
        module: the part of the detector that the node belongs to, by torch's exporter; empty where that is not known.
        source: the line of code that it comes from; empty where that is not known.
        max_abs_error: largest difference of an element; None where the two cannot be subtracted, or nothing was made.
        max_abs_value: largest magnitude of what it should be, for scale.
        batch_size: images in the batch.
        reason: what is different about the node, or what to look at.
        others: further nodes of which the same holds, in the graph's order.
    """

    node: str
    operator: str
    reads: tuple[str, ...]
    makes: str
    module: str = ""
    source: str = ""
    max_abs_error: float | None = None
    max_abs_value: float | None = None
    batch_size: int = 1
    reason: str = ""
    others: tuple[str, ...] = ()

    def paragraph(self) -> str:
        """All of it for a reader."""
        lines = [f"{self.node} ({self.operator}) reads {', '.join(self.reads) or 'nothing'} and makes {self.makes}"]
        if self.max_abs_error is not None:
            scale = "" if self.max_abs_value is None else f" of values up to {self.max_abs_value:.4g}"
            lines.append(f"difference: up to {self.max_abs_error:.4g}{scale}, in a batch of {self.batch_size}")
        else:
            lines.append(f"difference: not a number, in a batch of {self.batch_size}; see the reason")
        where = ", ".join(part for part in (self.module, self.source) if part)
        lines += [f"belongs to: {where}"] if where else []
        lines += [f"reason: {self.reason}"] if self.reason else []
        if self.others:
            more = f" and {len(self.others) - 5} more" if len(self.others) > 5 else ""
            lines.append(f"the same holds of {', '.join(self.others[:5])}{more}")
        return "\n  ".join(lines)
