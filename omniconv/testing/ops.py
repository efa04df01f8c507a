"""The contract of an operator, as small named checks over an `OpCase`; `check_op` runs them all.

Every implementation in the operator's table is held against the reference, which reads like the equation.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from omniconv.core.cases import OpCase
from omniconv.ops.dispatch import Implementation, table_of
from omniconv.testing.harness import (
    Check,
    compile_counted,
    poisoned_memory,
    require,
    require_equal,
    run_checks,
)
from omniconv.testing.layers import expect

__all__ = ["OP_CHECKS", "check_op", "draw_op_inputs", "op_name"]

_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}


def op_name(case: OpCase) -> str:
    """Return the operator's name, with the case's id if it has one."""
    return f"{case.op.__name__}[{case.id}]" if case.id else case.op.__name__


def draw_op_inputs(case: OpCase, dtype: torch.dtype = torch.float32, grad: bool = False) -> dict[str, Tensor]:
    """Return tensors for every tensor argument of the case, normal ones unless it draws them itself."""
    return {
        name: tensor.requires_grad_(grad and tensor.is_floating_point())
        for name, tensor in _draw(case, case.inputs, dtype).items()
    }


def _draw(case: OpCase, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(4)
    tensors = {
        name: case.draw.get(name, lambda shape, random: torch.randn(shape, generator=random))(shape, random)
        for name, shape in shapes.items()
    }
    return _cast(tensors, dtype)


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def _implementations(
    case: OpCase, dtype: torch.dtype, grad: bool
) -> Iterator[tuple[Implementation, str | None]]:
    table = table_of(case.op)
    call = table.prepare(**draw_op_inputs(case, dtype, grad), **case.kwargs)
    for row in table.implementations:
        yield row, row.supports(*call)


def _supported(case: OpCase, dtype: torch.dtype, grad: bool = False) -> list[str]:
    return [row.name for row, reason in _implementations(case, dtype, grad) if reason is None]


def _gradients(run: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    everything = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    output = run(**everything)
    leaves = {name: tensor for name, tensor in everything.items() if tensor.requires_grad}
    gradients = torch.autograd.grad((output * _weights(output)).sum(), list(leaves.values()))
    return output.detach(), dict(zip(leaves, gradients, strict=True))


def _weights(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)


def _reference(case: OpCase) -> Any:
    table = table_of(case.op)
    return lambda **tensors: table.reference(*table.prepare(**tensors, **case.kwargs))


def _named(case: OpCase, impl: str) -> Any:
    return lambda **tensors: case.op(**tensors, **case.kwargs, impl=impl)


def equals_reference(case: OpCase) -> None:
    """Every implementation gives the float64 reference's output and gradients."""
    exact = draw_op_inputs(case, torch.float64)
    wanted, expected = _gradients(_reference(case), exact)
    mend = "compare tap by tap with reference.py"
    for dtype, tolerance in _TOLERANCE.items():
        tensors = _cast(exact, dtype)
        for impl in ["auto", *_supported(case, dtype, True)]:
            output, gradients = _gradients(_named(case, impl), tensors)
            require_equal(output, wanted.to(dtype), f"{impl} {dtype}", mend, tolerance)
            with torch.no_grad():
                plain = case.op(**tensors, **case.kwargs, impl=impl)
            require_equal(plain, wanted.to(dtype), f"{impl} {dtype} without gradients", mend, tolerance)
            for name, gradient in gradients.items():
                what = f"{impl} {dtype} gradient of {name}"
                require_equal(gradient, expected[name].to(dtype), what, mend, tolerance)


def gradients_are_right(case: OpCase) -> None:
    """First and second derivatives of every implementation are those of finite differences."""
    for impl in _supported(case, torch.float64, True):
        tensors = draw_op_inputs(case, torch.float64, grad=True)

        def function(*values: Tensor, impl: str = impl, names: tuple[str, ...] = tuple(tensors)) -> Tensor:
            return _named(case, impl)(**dict(zip(names, values, strict=True)))

        gradcheck(function, tuple(tensors.values()), fast_mode=True)
        if case.twice:
            gradgradcheck(function, tuple(tensors.values()), fast_mode=True)


def each_gradient_alone(case: OpCase) -> None:
    """The gradient of one tensor does not depend on which others are asked for."""
    tensors = draw_op_inputs(case)
    for impl in _supported(case, torch.float32, True):
        _, together = _gradients(_named(case, impl), tensors)
        for name in together:
            leaves = {key: t.detach().requires_grad_(key == name) for key, t in tensors.items()}
            output = _named(case, impl)(**leaves)
            (alone,) = torch.autograd.grad((output * _weights(output)).sum(), [leaves[name]])
            require_equal(
                alone, together[name], f"{impl} gradient of {name} alone", "mind needs_input_grad", 1e-5
            )


def layouts(case: OpCase) -> None:
    """Views with gaps and channels-last maps give the same, inputs stay as they are, the format is kept."""
    tensors = draw_op_inputs(case)

    def filler(t: Tensor) -> Tensor:
        return torch.full_like(t, float("nan") if t.is_floating_point() else 99)

    forms = {
        "with gaps": lambda t: torch.stack([t, filler(t)], -1)[..., 0],
        "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t,
        "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
        "channels of channels-last": lambda t: (
            torch.cat([t, filler(t)], 1).contiguous(memory_format=torch.channels_last)[:, : t.shape[1]]
            if t.ndim == 4
            else t
        ),
    }
    mend = "use no strides of the caller"
    for impl in _supported(case, torch.float32, True):
        wanted, expected = _gradients(_named(case, impl), tensors)
        for form, change in forms.items():
            changed = {name: change(tensor) for name, tensor in tensors.items()}
            kept = {name: tensor.clone() for name, tensor in changed.items()}
            output, gradients = _gradients(_named(case, impl), changed)
            require_equal(output, wanted, f"{impl} {form}", mend, 1e-5)
            for name, gradient in gradients.items():
                require_equal(gradient, expected[name], f"{impl} {form} gradient of {name}", mend, 2e-5)
            for name, tensor in changed.items():
                require(torch.equal(tensor, kept[name]), f"{impl} changed {name}", "work on a new tensor")
            if "channels-last" in form and output.ndim == 4 and case.channels_last:
                last = output.is_contiguous(memory_format=torch.channels_last)
                require(last, f"{impl} does not keep channels-last", "return the input's memory format")


def low_precision(case: OpCase) -> None:
    """In bfloat16 and float16 every implementation errs at most twice as much as plain torch."""
    exact = draw_op_inputs(case, torch.float64)
    for dtype in (torch.bfloat16, torch.float16) if case.low_precision else ():
        tensors = _cast(exact, dtype)
        upcast = _cast(tensors, torch.float64)
        wanted, expected = _gradients(_reference(case), upcast)
        errors: dict[str, dict[str, float]] = {}
        for impl in _supported(case, dtype, True):
            output, gradients = _gradients(_named(case, impl), tensors)
            found = {"output": (output, wanted)} | {
                f"gradient of {n}": (g, expected[n]) for n, g in gradients.items()
            }
            errors[impl] = {what: float((a.double() - b).abs().max()) for what, (a, b) in found.items()}
            for what, error in errors[impl].items():
                limit = 2 * errors["torch"][what] + torch.finfo(dtype).eps
                fault = f"{impl} {what} in {dtype} errs by {error:.2g}, plain torch by {errors['torch'][what]:.2g}"
                require(error <= limit, fault, "accumulate in float32")


def named_never_falls_back(case: OpCase) -> None:
    """An implementation chosen by name runs as itself, or raises with the reason why it cannot."""
    for dtype in (torch.float32, torch.bfloat16 if case.low_precision else torch.float64):
        table = table_of(case.op)
        tensors = draw_op_inputs(case, dtype)
        call = table.prepare(**tensors, **case.kwargs)
        for row, reason in _implementations(case, dtype, False):
            if reason is None:
                with _Recorder() as direct:
                    row.run(*call)
                with _Recorder() as named:
                    case.op(**tensors, **case.kwargs, impl=row.name)
                missing = [op for op in set(direct.ops) if direct.ops.count(op) > named.ops.count(op)]
                extra = len(named.ops) - len(direct.ops)
                require(not missing, f"impl={row.name!r} runs something else", "run what the table selects")
                require(extra < 4, f"impl={row.name!r} runs {extra} calls more than it is", "run it once")
                continue
            try:
                case.op(**tensors, **case.kwargs, impl=row.name)
            except ValueError as error:
                told = reason in str(error) and row.name in str(error)
                fault = f"impl={row.name!r} raises {str(error)!r}"
                require(told, fault, f"say the name and {reason!r}")
            else:
                require(False, f"impl={row.name!r} answers a call that it cannot take", f"raise {reason!r}")


class _Recorder(TorchDispatchMode):
    """Notes which kernels of torch a block calls."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def auto_takes_a_supported_one(case: OpCase) -> None:
    """`auto` never picks an implementation that cannot take the call, and predicates do not change their minds."""
    table = table_of(case.op)
    for dtype in (torch.float32, torch.float64, *[torch.bfloat16] * case.low_precision):
        for grad in (False, True):
            call = table.prepare(**draw_op_inputs(case, dtype, grad), **case.kwargs)
            for row in table.implementations:
                reason = row.supports(*call)
                same = row.supports(*call) == reason
                require(same, f"supports of {row.name} changes its mind", "make it a pure function")
                if reason is None:
                    seconds = row.estimate(*call)
                    require(
                        seconds > 0, f"{row.name} is estimated at {seconds} s", "estimate a positive time"
                    )
            chosen = table.select("auto", call)
            reason = chosen.supports(*call)
            require(reason is None, f"auto picks {chosen.name} for {dtype}: {reason}", "ask supports first")


class _Call(nn.Module):
    def __init__(self, case: OpCase, impl: str) -> None:
        super().__init__()
        self.case, self.impl = case, impl

    def forward(self, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.case.inputs, tensors, strict=True))
        return self.case.op(**named, **self.case.kwargs, impl=self.impl)


def compiles(case: OpCase) -> None:
    """`torch.compile` gets one whole graph with the outputs and gradients of eager mode, at a second size too."""
    for impl in ["auto", *_supported(case, torch.float32, True)]:
        # Backward passes of plain torch can be traced; those of registered operators are proved to be.
        backend = "eager" if impl in ("auto", "torch") else "aot_eager"
        call, _ = compile_counted(_Call(case, impl), backend)
        for tensors in (draw_op_inputs(case), _longer(case)):
            wanted, expected = _gradients(_named(case, impl), tensors)
            output, gradients = _gradients(lambda call=call, **named: call(*named.values()), tensors)
            require_equal(output, wanted, f"{impl} compiled", "use what torch can trace", 1e-5)
            for name, gradient in gradients.items():
                require_equal(
                    gradient, expected[name], f"{impl} compiled gradient of {name}", "as above", 2e-5
                )


def exports(case: OpCase) -> None:
    """`torch.export` with the sizes that may change dynamic equals eager mode at another size."""
    tensors, other = draw_op_inputs(case), _longer(case)
    axes = tuple(
        {
            axis: torch.export.Dim.DYNAMIC
            for axis, size in enumerate(tensor.shape)
            if other[name].shape[axis] != size
        }
        or None
        for name, tensor in tensors.items()
    )
    if any(
        tensors[name].shape[axis] == 1 for name, of in zip(tensors, axes, strict=True) for axis in of or ()
    ):
        return  # a size of one is always made a constant
    for impl in ["auto", *_supported(case, torch.float32)]:
        module = _Call(case, impl)
        with torch.no_grad():
            program = torch.export.export(module, tuple(tensors.values()), dynamic_shapes=(axes,)).module()
            got, wanted = program(*other.values()), module(*other.values())
        require_equal(got, wanted, f"{impl} exported", "compute sizes from shapes", 1e-5)


def _longer(case: OpCase) -> dict[str, Tensor]:
    """Return inputs at the case's second size."""
    longer = case.longer
    if longer is None:
        first, shape = next(iter(case.inputs.items()))
        longer = {first: tuple(size if axis == 1 else size + 2 for axis, size in enumerate(shape))}
    return _draw(case, {**case.inputs, **longer}, torch.float32)


class _Registered(TorchDispatchMode):
    """Notes the calls of operators that are not torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prim", "prims"):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def registered_operators_are_sound(case: OpCase) -> None:
    """`torch.library.opcheck` passes for every operator that an implementation has registered with torch."""
    tensors = draw_op_inputs(case)
    for impl in _supported(case, torch.float32):
        with _Registered() as seen, torch.no_grad():
            _named(case, impl)(**tensors)
        for func, args, kwargs in seen.calls:
            torch.library.opcheck(func, args, kwargs)


def reads_no_fresh_memory(case: OpCase) -> None:
    """Outputs and gradients do not change when fresh memory is full of NaN."""
    tensors = draw_op_inputs(case)
    for impl in _supported(case, torch.float32, True):
        wanted, expected = _gradients(_named(case, impl), tensors)
        with poisoned_memory():
            output, gradients = _gradients(_named(case, impl), tensors)
        require_equal(output, wanted, impl, "write what torch.empty gives before reading it", 1e-6)
        for name, gradient in gradients.items():
            require_equal(gradient, expected[name], f"{impl} gradient of {name}", "initialise buffers", 1e-5)


def fails_by_name(case: OpCase) -> None:
    """Wrong arguments and shapes raise the promised error with the promised message."""
    for wanted in case.raises:
        tensors = draw_op_inputs(case)
        if wanted.inputs:
            shapes = zip(case.inputs, wanted.inputs, strict=True)
            tensors |= {
                name: tensors[name].new_zeros(shape) if shape != tensors[name].shape else tensors[name]
                for name, shape in shapes
            }
        arguments = {**tensors, **case.kwargs, **wanted.kwargs}
        expect(wanted, lambda arguments=arguments: case.op(**arguments))


OP_CHECKS: tuple[Check, ...] = (
    equals_reference,
    gradients_are_right,
    each_gradient_alone,
    layouts,
    low_precision,
    named_never_falls_back,
    auto_takes_a_supported_one,
    compiles,
    exports,
    registered_operators_are_sound,
    reads_no_fresh_memory,
    fails_by_name,
)


def check_op(case: OpCase) -> None:
    """Run the whole contract of an operator over one of its cases.

    Raises:
        ContractError: naming every check that failed, the fault and the mend.
    """
    run_checks(OP_CHECKS, op_name(case), case)
