"""The contract of a loss, as small named checks over a `LossCase`; `check_loss` runs them all."""

import copy
import inspect
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from omniconv.core.cases import LossCase
from omniconv.testing.harness import (
    Check,
    compile_counted,
    poisoned_memory,
    require,
    require_equal,
    run_checks,
    seeded,
)
from omniconv.testing.layers import expect

__all__ = ["LOSS_CHECKS", "check_loss", "draw_loss_inputs", "loss_name"]


def loss_name(case: LossCase) -> str:
    """Return the name of the loss, with the case's id if it has one."""
    name = getattr(case.make, "__name__", repr(case.make))
    return f"{name}[{case.id}]" if case.id else name


def draw_loss_inputs(case: LossCase, dtype: torch.dtype = torch.float32, longer: int = 0) -> list[Tensor]:
    """Return predictions and targets of the case, `longer` along the first axis."""
    random = torch.Generator().manual_seed(4)
    shapes = [(shape[0] + longer, *shape[1:]) for shape in case.inputs]
    predictions = torch.randn(shapes[0], generator=random).to(dtype)
    if case.targets == "classes":
        return [predictions, torch.randint(shapes[0][1], shapes[1], generator=random)]
    targets = torch.randn(shapes[1], generator=random)
    return [predictions, ((targets > 0).to(dtype) if case.targets == "binary" else targets.to(dtype))]


def _make(case: LossCase, **kwargs: Any) -> nn.Module:
    with seeded():
        return case.make(**{**case.kwargs, **kwargs})


def _with_gradient(call: Any, predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    leaf = predictions.detach().clone().requires_grad_()
    output = call(leaf, targets)
    (gradient,) = torch.autograd.grad(output.sum(), [leaf])
    return output.detach(), gradient


def output_shape_and_dtype(case: LossCase) -> None:
    """The output has the case's shape and the predictions' type and is finite, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        output = _make(case).to(dtype)(*draw_loss_inputs(case, dtype))
        got = tuple(output.shape), output.dtype
        require(got == (case.output, dtype), f"output {got}", f"should be {(case.output, dtype)}")
        require(
            bool(torch.isfinite(output).all()), f"output in {dtype} is not finite", "use stable logarithms"
        )


def known_value(case: LossCase) -> None:
    """The value worked out by hand comes out."""
    predictions, targets, value = case.known
    kind = torch.int64 if case.targets == "classes" else torch.float64
    output = _make(case).double()(torch.tensor(predictions).double(), torch.tensor(targets, dtype=kind))
    require_equal(output, torch.tensor(value).double(), "value", "compare with the paper's equation", 1e-6)


def gradient_is_right(case: LossCase) -> None:
    """In float64 the gradient is that of finite differences."""
    predictions, targets = draw_loss_inputs(case, torch.float64)
    loss = _make(case).double()
    gradcheck(lambda p: loss(p, targets), (predictions.requires_grad_(),))


def finite_at_extreme_predictions(case: LossCase) -> None:
    """Loss and gradient are finite at predictions of 0 and of plus and minus ten thousand."""
    predictions, targets = draw_loss_inputs(case)
    for what, extreme in (
        ("of +-1e4", predictions.sign() * 1e4),
        ("of 0", torch.zeros_like(predictions)),
        ("all 1e4", torch.full_like(predictions, 1e4)),
        ("all -1e4", torch.full_like(predictions, -1e4)),
    ):
        output, gradient = _with_gradient(_make(case), extreme, targets)
        finite = bool(torch.isfinite(output).all())
        require(
            finite, f"loss at predictions {what} is not finite", "use logsigmoid, softplus or log_softmax"
        )
        finite = bool(torch.isfinite(gradient).all())
        require(finite, f"gradient at predictions {what} is not finite", "mind 0 * inf in the derivative")


def reduction_reduces(case: LossCase) -> None:
    """Where there is a `reduction`, "mean" and "sum" are the mean and sum of "none"."""
    if "reduction" not in inspect.signature(case.make).parameters:
        return
    inputs = draw_loss_inputs(case, torch.float64)
    single = _make(case, reduction="none").double()(*inputs)
    require(single.ndim > 0, "reduction='none' gives one number", "return the loss of every element")
    for reduction, wanted in (("mean", single.mean()), ("sum", single.sum())):
        output = _make(case, reduction=reduction).double()(*inputs)
        require_equal(output, wanted, f"reduction={reduction!r}", "reduce all elements alike", 1e-10)


def inputs_unmodified(case: LossCase) -> None:
    """Predictions and targets are the same after the call, and views with gaps give the same loss."""
    loss, inputs = _make(case), draw_loss_inputs(case)
    copies = [x.clone() for x in inputs]
    wanted = loss(*inputs)
    for x, kept in zip(inputs, copies, strict=True):
        require(
            torch.equal(x, kept) and x._version == 0, "an input was changed in place", "work on a new tensor"
        )
    views = [torch.stack([x, torch.zeros_like(x)], -1)[..., 0] for x in inputs]
    require_equal(loss(*views), wanted, "views with gaps", "use reshape instead of view", 1e-6)


def copies_and_state(case: LossCase) -> None:
    """Two of one seed, deep copies, pickles and strictly loaded ones give the same loss."""
    loss, inputs = _make(case), draw_loss_inputs(case)
    wanted, other = loss(*inputs), _make(case)
    other.load_state_dict(loss.state_dict(), strict=True)
    for what, twin in (
        ("the loaded one", other),
        ("deepcopy", copy.deepcopy(loss)),
        ("pickle", pickle.loads(pickle.dumps(loss))),
    ):
        require_equal(twin(*inputs), wanted, what, "keep plain attributes, no lambdas")


def compiles_once(case: LossCase) -> None:
    """`torch.compile` gets one whole graph for two batch sizes, with the loss and gradient of eager mode."""
    loss = _make(case)
    call, graphs = compile_counted(loss)
    first: int | None = None
    for longer in (0, 2):
        inputs = draw_loss_inputs(case, longer=longer)
        wanted, expected = _with_gradient(loss, *inputs)
        output, gradient = _with_gradient(call, *inputs)
        require_equal(output, wanted, "compiled loss", "avoid Python state", 1e-5)
        require_equal(gradient, expected, "compiled gradient", "avoid Python state", 1e-5)
        first = len(graphs) if first is None else first
        require(len(graphs) == first, "another batch size needs a new graph", "branch on no size")


def reads_no_fresh_memory(case: LossCase) -> None:
    """Loss and gradient do not change when fresh memory is full of NaN."""
    inputs = draw_loss_inputs(case)
    wanted = _with_gradient(_make(case), *inputs)
    with poisoned_memory():
        got = _with_gradient(_make(case), *inputs)
    for what, a, b in zip(("loss", "gradient"), got, wanted, strict=True):
        require_equal(a, b, what, "write what torch.empty gives before reading it", 1e-6)


def fails_by_name(case: LossCase) -> None:
    """Wrong arguments and shapes raise the promised error with the promised message."""
    for wanted in case.raises:

        def call(wanted: Any = wanted) -> None:
            loss = _make(case, **wanted.kwargs)
            if wanted.inputs:
                loss(*(torch.zeros(shape) for shape in wanted.inputs))

        expect(wanted, call)


LOSS_CHECKS: tuple[Check, ...] = (
    output_shape_and_dtype,
    known_value,
    gradient_is_right,
    finite_at_extreme_predictions,
    reduction_reduces,
    inputs_unmodified,
    copies_and_state,
    compiles_once,
    reads_no_fresh_memory,
    fails_by_name,
)


def check_loss(case: LossCase) -> None:
    """Run the whole contract of a loss over one of its cases.

    Raises:
        ContractError: naming every check that failed, the fault and the mend.
    """
    run_checks(LOSS_CHECKS, loss_name(case), case)
