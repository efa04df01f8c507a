"""What the contracts share: named checks, failures that say the mend, and components made reproducibly."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Check",
    "ContractError",
    "compile_counted",
    "compile_inductor",
    "module_gradients",
    "poisoned_memory",
    "randomize",
    "require",
    "require_equal",
    "require_equal_gradients",
    "require_finite_gradients",
    "run_check",
    "run_checks",
    "seeded",
    "state_copy",
]

Check = Callable[[Any], None]
"""A function of one subject (a case, a model's name ...) whose docstring is the promise that it checks."""


class ContractError(AssertionError):
    """A component broke a promise of its contract; the message names component, check, fault and mend.

    Attributes:
        check: name of the check that failed.
    """

    def __init__(self, component: str, check: str, promise: str, fault: str) -> None:
        super().__init__(f"{component} fails {check} ({promise}): {fault}")
        self.check = check


class _BrokenPromiseError(Exception):
    """Raised by `require`; `run_check` adds the names."""


def require(holds: bool, fault: str, mend: str) -> None:
    """Fail the running check with what is wrong and how to mend it, unless `holds`."""
    if not holds:
        raise _BrokenPromiseError(f"{fault}; {mend}")


def run_check(check: Check, component: str, subject: Any) -> None:
    """Run one check; whatever goes wrong in it becomes a ContractError that names it.

    Raises:
        ContractError: if the component does not keep the promise.
    """
    promise = (check.__doc__ or "").strip().splitlines()[0].rstrip(".")
    try:
        check(subject)
    except _BrokenPromiseError as error:
        raise ContractError(component, check.__name__, promise, str(error)) from None
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        fault = f"{type(error).__name__}: {lines[0]}"
        raise ContractError(component, check.__name__, promise, fault) from error


def run_checks(checks: Sequence[Check], component: str, subject: Any) -> None:
    """Run all checks and raise one ContractError for all failures together, the first one's check named."""
    failures: list[ContractError] = []
    for check in checks:
        try:
            run_check(check, component, subject)
        except ContractError as failure:
            failures.append(failure)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        error = ContractError(component, failures[0].check, f"{len(failures)} checks", "")
        error.args = ("\n".join(str(failure) for failure in failures),)
        raise error


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Seed torch's global generator for a block and put its state back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def randomize(module: nn.Module, seed: int = 1) -> nn.Module:
    """Move every parameter and running statistic of `module` off its initial value, in place.

    Zero-initialised branches and fresh running statistics hide faults.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=random)
                parameter.add_(0.1 * noise.to(parameter.dtype))
        for name, buffer in module.named_buffers():
            last = name.rpartition(".")[2]
            if last == "running_mean":
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=random).to(buffer.dtype))
            elif last == "running_var":
                buffer.mul_(0.5 + torch.rand(buffer.shape, generator=random).to(buffer.dtype))
    return module


def require_equal(actual: Tensor, wanted: Tensor, what: str, mend: str, tolerance: float = 0.0) -> None:
    """Require shape, type and values to agree, to `tolerance` times the largest wanted magnitude (at least 1)."""
    require(
        actual.shape == wanted.shape and actual.dtype == wanted.dtype,
        f"{what}: got {_kind(actual)} instead of {_kind(wanted)}",
        mend,
    )
    if actual.numel() == 0:
        return
    finite = bool(torch.isfinite(actual).all()) or not bool(torch.isfinite(wanted).all())
    require(finite, f"{what}: got values that are not finite", mend)
    if tolerance == 0:
        require(
            torch.equal(actual, wanted), f"{what}: values differ by {_distance(actual, wanted):.1e}", mend
        )
        return
    scale = max(1.0, float(wanted.detach().abs().max()))
    error = _distance(actual, wanted) / scale
    require(error <= tolerance, f"{what}: values differ by {error:.1e} (limit {tolerance:.0e})", mend)


def require_equal_gradients(
    actual: dict[str, Tensor | None], wanted: dict[str, Tensor | None], mend: str, tolerance: float
) -> None:
    """Require two sets of gradients by name to agree; see `require_equal`."""
    for name, expected in wanted.items():
        gradient = actual[name]
        if gradient is None or expected is None:
            require(gradient is expected, f"{name} has a gradient in one of two ways only", mend)
        else:
            require_equal(gradient, expected, f"gradient of {name}", mend, tolerance)


def require_finite_gradients(gradients: dict[str, Tensor | None]) -> None:
    """Require every gradient to be there and to be finite."""
    for name, gradient in gradients.items():
        mend = "use it in forward or remove it"
        require(gradient is not None and gradient.numel() > 0, f"{name} gets no gradient", mend)
        finite = gradient is not None and bool(torch.isfinite(gradient).all())
        require(finite, f"gradient of {name} is not finite", "mind 0/0 and square roots at 0")


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


def module_gradients(
    module: nn.Module, inputs: Sequence[Tensor], call: Callable[..., Any] | None = None
) -> tuple[Any, dict[str, Tensor | None]]:
    """Return (output, gradients by name) of a fixed random projection of all outputs.

    Args:
        module: its parameters' gradients are returned under their names, those of the inputs under "input 0" ...
        inputs: floating ones are differentiated.
        call: what is called instead of the module itself, for example its compiled form.
    """
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]  # strides are kept
    module.zero_grad(set_to_none=True)
    with seeded(3):
        output = (module if call is None else call)(*leaves)
    random = torch.Generator().manual_seed(2)
    terms = []
    for y in output if isinstance(output, list | tuple) else [output]:
        weights = torch.randn(y.shape, generator=random).to(y.dtype)
        terms.append((y * weights).sum())
    sum(terms[1:], terms[0]).backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    gradients |= {f"input {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.requires_grad}
    detached = [y.detach() for y in output] if isinstance(output, list | tuple) else output.detach()
    return detached, gradients


def state_copy(module: nn.Module) -> dict[str, Tensor]:
    """Return a detached copy of all parameters and buffers, non-persistent ones included."""
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory with NaN whenever torch hands out fresh memory without writing to it."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # A module with a property of its own, which type checkers do not see.
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            memory.fill_uninitialized_memory = filled


def compile_counted(
    module: Callable[..., Any], backend: str = "eager"
) -> tuple[Callable[..., Any], list[int]]:
    """Return (`torch.compile` of `module`, a list that grows with every graph compiled).

    Whole graph, sizes dynamic. The backend "eager" runs the graph as it was traced; "aot_eager" traces the backward
    pass as well, which takes four times as long and finds operators that cannot be traced in it.
    """
    from torch._dynamo.backends.registry import lookup_backend

    graphs: list[int] = []
    run = lookup_backend(backend)

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graphs))
        return run(graph, inputs)

    return _quiet_compile(module, counting), graphs


def compile_inductor(module: Callable[..., Any]) -> Callable[..., Any]:
    """Return `torch.compile` of `module`, whole graph, sizes dynamic, with torch's default code generator."""
    return _quiet_compile(module, "inductor")


def _quiet_compile(module: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)

    def call(*args: Any, **kwargs: Any) -> Any:
        # The compiler trips over deprecations of torch's own; they say nothing about the component.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return compiled(*args, **kwargs)

    return call
