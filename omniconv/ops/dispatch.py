"""Which implementation of an operator runs: an ordered table, a predicate and a cost for every row.

An operator validates its arguments into one tuple, the call. Every implementation says with `supports` why
it cannot take a call (or returns None), and with `estimate` about how many seconds it would take. `auto`
takes the cheapest one that can; one chosen by name runs or raises, and never falls back.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from omniconv.core.config import closest
from omniconv.ops.choices import describe_call, known_choices

__all__ = [
    "Explanation",
    "Implementation",
    "Row",
    "Table",
    "explain",
    "needs_grad",
    "recording",
    "table_of",
    "transformed",
]

MARGIN = 1.25
"""How many times as fast as plain torch an implementation must be by its estimate before `auto` takes it."""

PLAIN = "torch"
"""Name of the implementation in plain torch, which every operator has and which takes every call."""


def _exporting() -> bool:
    # torch before 2.7 cannot tell export from compile; plain torch is right for both.
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def _less(seconds: float, others: float) -> bool:
    """Return whether one estimate is below another.

    Of symbolic sizes only what holds for all counts: a guard on them would compile anew wherever two estimates cross.
    """
    if torch.compiler.is_compiling():
        # Brings sympy, which programs that compile nothing need not load.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(seconds < others)
    return seconds < others


# Choices kept of an operator; programs with more kinds of calls than that begin anew.
_MOST_KEPT = 10_000


def _signature(call: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return all that the choice depends on, or None for calls that are estimated anew every time."""
    if torch.compiler.is_compiling() or transformed():
        return None
    signature: list[Any] = [torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()]
    for value in call:
        if type(value) is Tensor or type(value) is Parameter:
            signature += (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
        elif value is None or isinstance(value, int | float | str | tuple):
            signature.append(value)
        else:
            return None
    return tuple(signature)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator; all three functions take the members of a call.

    Attributes:
        name: what `impl=` calls it.
        run: computes.
        supports: returns None, or the reason why it cannot take the call; depends on device, dtype, shape
            and grad mode alone.
        estimate: seconds that it would take, from a cost model fitted to measurements.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None]
    estimate: Callable[..., float]


@dataclass(frozen=True)
class Table:
    """The implementations of an operator, plain torch first.

    Attributes:
        op: name of the operator.
        prepare: validates the operator's arguments (all but `impl`) and returns the call.
        reference: computes a call slowly, as the equation reads.
        implementations: in order; of equally cheap ones the first is taken.
        kept: what `auto` took for calls that it has met, by their signatures; estimating anew every time would take as
            long as a small convolution.
    """

    op: str
    prepare: Callable[..., tuple[Any, ...]]
    reference: Callable[..., Any]
    implementations: tuple[Implementation, ...]
    kept: dict[tuple[Any, ...], Implementation] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.implementations or self.implementations[0].name != PLAIN:
            raise ValueError(f"the first implementation of {self.op} must be {PLAIN!r}")

    def select(self, impl: str, call: tuple[Any, ...]) -> Implementation:
        """Return the implementation that computes `call`.

        Exported programs run elsewhere and at other sizes, so `auto` exports plain torch.

        Raises:
            ValueError: if no implementation is called `impl`, or that one cannot take the call.
        """
        if impl == "auto":
            plain = self.implementations[0]
            if not torch.compiler.is_compiling():
                measured = self._measured(call)
                if measured is not None:
                    return measured
            if _exporting():
                return plain
            key = _signature(call)
            if key is None:
                return self._cheapest(call)
            chosen = self.kept.get(key)
            if chosen is None:
                if len(self.kept) >= _MOST_KEPT:
                    self.kept.clear()
                chosen = self.kept[key] = self._cheapest(call)
            return chosen
        for row in self.implementations:
            if row.name == impl:
                reason = row.supports(*call)
                if reason is not None:
                    raise ValueError(
                        f"impl {impl!r} of {self.op} cannot take this call: {reason}; use impl='auto'"
                    )
                return row
        names = ["auto", *(row.name for row in self.implementations)]
        raise ValueError(f"{self.op} has no impl {impl!r}{closest(impl, names)} (of {', '.join(names)})")

    def _cheapest(self, call: tuple[Any, ...]) -> Implementation:
        """Return the implementation with the least estimate."""
        plain, *others = self.implementations
        others = [row for row in others if row.supports(*call) is None]
        if not others:
            return plain
        # Estimates err; plain torch gives way only to what should be clearly faster.
        best, least = plain, plain.estimate(*call) / MARGIN
        for row in others:
            seconds = row.estimate(*call)
            if _less(seconds, least):
                best, least = row, seconds
        return best

    def _measured(self, call: tuple[Any, ...]) -> Implementation | None:
        """Return the implementation that `omniconv.tune` found to be the fastest for such a call, or None."""
        if _calls is not None:
            _calls[self.op, describe_call(call)] = self, call, torch.is_grad_enabled()
        known = known_choices().get(self.op)
        name = known.get(describe_call(call)) if known else None
        for row in self.implementations:
            if row.name == name and row.supports(*call) is None:
                return row
        return None


Recorded = dict[tuple[str, str], tuple[Table, tuple[Any, ...], bool]]

_calls: Recorded | None = None


@contextmanager
def recording() -> Iterator[Recorded]:
    """Collect the different calls of operators with `impl="auto"` that are made meanwhile, with their grad mode."""
    global _calls
    _calls = {}
    try:
        yield _calls
    finally:
        _calls = None


@dataclass(frozen=True)
class Row:
    """What is known about one implementation for one call.

    Attributes:
        name: of the implementation.
        reason: why it cannot take the call, or None.
        seconds: the estimate, or None if it cannot.
    """

    name: str
    reason: str | None
    seconds: float | None


@dataclass(frozen=True)
class Explanation:
    """Why `auto` takes the implementation it takes; reads as a table when printed.

    Attributes:
        op: name of the operator.
        chosen: name of the implementation that `auto` runs.
        rows: all implementations, in the table's order.
    """

    op: str
    chosen: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen}"]
        for row in self.rows:
            what = f"about {1e3 * row.seconds:.3g} ms" if row.seconds is not None else row.reason
            lines.append(f"  {'*' if row.name == self.chosen else ' '} {row.name}: {what}")
        return "\n".join(lines)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Return whether gradients of any of the tensors will be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def transformed() -> bool:
    """Return whether a torch.func transform or forward-mode differentiation is under way."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def table_of(op: Callable[..., Any]) -> Table:
    """Return the table of a public operator, the `TABLE` of the module that defines it.

    Raises:
        TypeError: if `op` is no operator with a table.
    """
    table = getattr(sys.modules.get(getattr(op, "__module__", "")), "TABLE", None)
    if not isinstance(table, Table) or table.op != op.__name__:
        raise TypeError(f"{op!r} is no operator with a table of implementations")
    return table


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Return which implementation `op(*args, **kwargs)` takes under `auto`, and why; runs nothing.

    Args:
        op: a public operator, for example `omniconv.ops.depthwise_conv`.
        *args: what it would be called with.
        **kwargs: likewise, without `impl`.
    """
    table = table_of(op)
    call = table.prepare(*args, **kwargs)
    rows = []
    for row in table.implementations:
        reason = row.supports(*call)
        rows.append(Row(row.name, reason, row.estimate(*call) if reason is None else None))
    return Explanation(table.op, table.select("auto", call).name, tuple(rows))
