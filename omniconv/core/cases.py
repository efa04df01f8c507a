"""Cases: each public component says beside its code how a small one is made and what goes in.

`omniconv.testing` runs its contract over them, the docs show them and the benchmarks time them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Case", "LossCase", "OpCase", "Raises"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Raises:
    """A call that must fail, and the exact message with which it must.

    Attributes:
        error: the exception type.
        message: the whole message.
        kwargs: arguments that replace those of the case when the component is made.
        inputs: input shapes that replace those of the case when it is called; () if construction fails.
    """

    error: type[Exception]
    message: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Shape, ...] = ()


@dataclass(frozen=True)
class Case:
    """One small configuration of a layer.

    Attributes:
        make: the class.
        kwargs: its arguments.
        inputs: shapes of the positional inputs, batch first. Non-square and odd, so that nothing that
            assumes a square or an even size passes.
        output: shape of the output.
        id: what tells this case from the others of its class.
        vary: axes of the first input whose size the layer must take as it comes (compile, export).
        minimal: smallest first input that must work, or None if `inputs` are the smallest.
        channels_last: whether a channels-last 4-d input must give a channels-last output.
        per_sample: whether, in eval mode, each sample's output depends on that sample alone.
        raises: calls that must fail.
    """

    make: Callable[..., Any]
    kwargs: Mapping[str, Any]
    inputs: tuple[Shape, ...]
    output: Shape
    id: str = ""
    vary: tuple[int, ...] = (0, 2, 3)
    minimal: Shape | None = None
    channels_last: bool = True
    per_sample: bool = True
    raises: tuple[Raises, ...] = ()


@dataclass(frozen=True)
class LossCase:
    """One small configuration of a loss, called as loss(predictions, targets).

    Attributes:
        make: the class.
        kwargs: its arguments.
        inputs: shapes of predictions and targets.
        output: shape of the output, () if it is reduced to one number.
        known: (predictions, targets, value): nested numbers, and the value worked out by hand.
        targets: what targets are: "binary" (0.0 or 1.0), "classes" (indices below the predictions' axis 1) or
            "real" numbers.
        id: what tells this case from the others of its class.
        raises: calls that must fail.
    """

    make: Callable[..., Any]
    kwargs: Mapping[str, Any]
    inputs: tuple[Shape, Shape]
    output: Shape
    known: tuple[Any, Any, Any]
    targets: Literal["binary", "classes", "real"] = "real"
    id: str = ""
    raises: tuple[Raises, ...] = ()


@dataclass(frozen=True)
class OpCase:
    """One call of an operator.

    Attributes:
        op: the public function.
        inputs: name -> shape of every tensor argument, in order.
        kwargs: the other arguments.
        id: what tells this case from the others.
        raises: calls that must fail (`kwargs` replace arguments, `inputs` replace shapes in order).
        draw: name -> function of (shape, generator) that makes a tensor, where it is not normal: positive
            numbers, or integers, which have no gradient and keep their type.
        longer: name -> shape of the tensors that change at a second size, which compiled and exported programs
            must take too; by default the first tensor, by two in every axis but the second. Empty if no size can
            change.
        channels_last: whether a channels-last 4-d first tensor must give a channels-last output.
        low_precision: whether bfloat16 and float16 are taken.
        twice: whether second derivatives are right as well.
    """

    op: Callable[..., Any]
    inputs: Mapping[str, Shape]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    raises: tuple[Raises, ...] = ()
    draw: Mapping[str, Callable[[Shape, Any], Any]] = field(default_factory=dict)
    longer: Mapping[str, Shape] | None = None
    channels_last: bool = True
    low_precision: bool = True
    twice: bool = True
