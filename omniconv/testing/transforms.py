"""The contract of a transform: model in, changed copy and true report out; `check_transform` runs it."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from omniconv.compress.report import CompressionReport
from omniconv.compress.sparse_file import load_sparse, save_sparse
from omniconv.design.cost import count_cost
from omniconv.testing.harness import Check, randomize, require, require_equal, run_checks, seeded, state_copy

__all__ = ["TRANSFORM_CHECKS", "TransformCase", "check_transform"]


@dataclass(frozen=True)
class TransformCase:
    """One use of a transform.

    Attributes:
        name: of the transform.
        run: takes a model and returns the changed copy and the report.
        model: makes the model.
        input_shape: of one sample.
    """

    name: str
    run: Callable[[nn.Module], tuple[nn.Module, CompressionReport]]
    model: Callable[[], nn.Module]
    input_shape: tuple[int, ...]


def _make(case: TransformCase) -> nn.Module:
    with seeded():
        return randomize(case.model()).train()


def _run(case: TransformCase, model: nn.Module) -> tuple[nn.Module, CompressionReport]:
    with seeded(5):
        return case.run(model)


def _hooks(module: nn.Module) -> int:
    return sum(
        len(hooks)
        for m in module.modules()
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._state_dict_hooks)
    )


def input_model_unchanged(case: TransformCase) -> None:
    """The model that goes in keeps its values, modules, mode, gradients and hooks."""
    model = _make(case)
    x = torch.randn(2, *case.input_shape, generator=torch.Generator().manual_seed(4))
    before = state_copy(model)
    modules = {name: type(module) for name, module in model.named_modules()}
    result, _ = _run(case, model)
    mend = "work on copy.deepcopy(model)"
    require({n: type(m) for n, m in model.named_modules()} == modules, "its modules were replaced", mend)
    require(all(module.training for module in model.modules()), "its mode was changed", mend)
    require(all(p.grad is None for p in model.parameters()), "it was left with gradients", mend)
    require(all(p.requires_grad for p in model.parameters()), "its parameters were frozen", mend)
    require(_hooks(model) == 0, "it was left with hooks", "remove every hook in a finally block")
    after = state_copy(model)
    require(before.keys() == after.keys(), f"its state is {before.keys() ^ after.keys()} off", mend)
    for name, tensor in before.items():
        require_equal(after[name], tensor, name, mend)
    shared = {p.data_ptr() for p in result.parameters()} & {p.data_ptr() for p in model.parameters()} - {0}
    require(not shared, "input and result share parameters", mend)
    with torch.no_grad():
        result.train()(x)
    after = state_copy(model)
    for name, tensor in before.items():
        require_equal(after[name], tensor, f"{name}, after the result was used", mend)


def result_is_a_plain_module(case: TransformCase) -> None:
    """What comes out is a module without hooks or parametrizations that runs, copies and loads its own state."""
    result, _ = _run(case, _make(case))
    require(isinstance(result, nn.Module), f"the result is a {type(result).__name__}", "return a module")
    require(_hooks(result) == 0, "the result has hooks", "remove them")
    parametrized = [name for name, m in result.named_modules() if parametrize.is_parametrized(m)]
    require(not parametrized, f"{parametrized} are parametrized", "make the change permanent")
    x = torch.randn(2, *case.input_shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        wanted = result.eval()(x)
        require(bool(torch.isfinite(wanted).all()), "its output is not finite", "mind empty layers")
        twin = copy.deepcopy(result)
        twin.load_state_dict(result.state_dict(), strict=True)
        require_equal(twin(x), wanted, "output of a copy", "keep plain attributes")


def report_is_true(case: TransformCase) -> None:
    """Parameters, zeros, multiply-adds and bytes are those that one counts in the models and the file."""
    model = _make(case)
    result, report = _run(case, model)
    for when, size, counted in (("before", report.before, model), ("after", report.after, result)):
        parameters = sum(p.numel() for p in counted.parameters())
        nonzero = sum(int(p.count_nonzero()) for p in counted.parameters())
        mend = f"count {when} in the right model"
        require(
            size.parameters == parameters, f"{when}: {size.parameters} parameters, counted {parameters}", mend
        )
        require(size.nonzero == nonzero, f"{when}: {size.nonzero} are not zero, counted {nonzero}", mend)
        if size.macs is not None:
            macs = count_cost(counted, case.input_shape).macs
            require(size.macs == macs, f"{when}: {size.macs} multiply-adds, counted {macs}", mend)
        if size.bytes is not None:
            stored, written = _file_bytes(counted)
            fault = f"{when}: {size.bytes} bytes, the file holds {stored} in {written}"
            require(stored <= size.bytes <= written, fault, mend)
    require(bool(report.method), "the report names no method", "set method")


def _file_bytes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes that the tensors take in a packed weight file, and those of the whole file."""
    state: dict[str, Any] = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        save_sparse(path, state)
        loaded, _ = load_sparse(path)
        for name, tensor in state.items():
            require_equal(loaded[name], tensor, f"{name} in the file", "save what was reported")
        content = path.read_bytes()
    # safetensors: eight bytes with the length of the header, the header, the tensors.
    return len(content) - 8 - int.from_bytes(content[:8], "little"), len(content)


TRANSFORM_CHECKS: tuple[Check, ...] = (input_model_unchanged, result_is_a_plain_module, report_is_true)


def check_transform(case: TransformCase) -> None:
    """Run the whole contract of a transform over one case.

    Raises:
        ContractError: naming every check that failed, the fault and the mend.
    """
    run_checks(TRANSFORM_CHECKS, case.name, case)
