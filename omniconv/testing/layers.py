"""The contract of a layer, as small named checks over a `Case`; `check_layer` runs them all."""

import copy
import inspect
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from omniconv.core.cases import Case, Raises
from omniconv.layers.conv.reparam import Mergeable, reparameterize
from omniconv.testing.harness import (
    Check,
    compile_counted,
    compile_inductor,
    module_gradients,
    poisoned_memory,
    randomize,
    require,
    require_equal,
    require_equal_gradients,
    require_finite_gradients,
    run_checks,
    seeded,
    state_copy,
)

__all__ = ["LAYER_CHECKS", "SLOW_LAYER_CHECKS", "build", "case_name", "check_layer", "draw_inputs"]

SIZES = (0, 1, 3)
"""How much longer than the case says the varied axes are, in turn."""


def case_name(case: Case) -> str:
    """Return the name of the component, with the case's id if it has one."""
    name = getattr(case.make, "__name__", repr(case.make))
    return f"{name}[{case.id}]" if case.id else name


def build(case: Case, dtype: torch.dtype = torch.float32, *, random_state: bool = True) -> nn.Module:
    """Make the case's module in training mode, with all parameters off their initial values by default."""
    with seeded():
        module = case.make(**case.kwargs)
    return (randomize(module) if random_state else module).to(dtype).train()


def draw_inputs(
    case: Case, dtype: torch.dtype = torch.float32, longer: int = 0, seed: int = 4
) -> list[Tensor]:
    """Return normal inputs of the case; its varied axes are `longer` than it says.

    Axes of further inputs vary along where they are as long as the first input's.
    """
    random = torch.Generator().manual_seed(seed)
    first = case.inputs[0]
    inputs = []
    for shape in case.inputs:
        sizes = [
            size + longer if axis in case.vary and axis < len(first) and size == first[axis] else size
            for axis, size in enumerate(shape)
        ]
        inputs.append(torch.randn(sizes, generator=random).to(dtype))
    return inputs


def _evaluate(module: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad(), seeded(3):
        return module.eval()(*inputs)


def meta_construction(case: Case) -> None:
    """Made on the meta device, it takes no memory, and a forward pass there gives the output's shape."""
    with torch.device("meta"):
        module = case.make(**case.kwargs)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        require(tensor.is_meta, f"{name} is on {tensor.device}", "make it with device=device")
    output = module.eval()(*(x.to("meta") for x in draw_inputs(case)))
    require(tuple(output.shape) == case.output, f"output {tuple(output.shape)}", f"should be {case.output}")


def device_and_dtype(case: Case) -> None:
    """A layer with parameters takes `device` and `dtype` and makes its parameters so."""
    with seeded():
        if not any(True for _ in case.make(**case.kwargs).parameters()):
            return
    missing = {"device", "dtype"} - set(inspect.signature(case.make).parameters)
    require(
        not missing, f"it takes no {' and no '.join(sorted(missing))}", "add device=None, dtype=None, last"
    )
    module = case.make(**case.kwargs, device="meta", dtype=torch.float64)
    for name, parameter in module.named_parameters():
        require(
            parameter.is_meta and parameter.dtype == torch.float64,
            f"{name} is {parameter.dtype} on {parameter.device}",
            "pass device and dtype on to every submodule and parameter",
        )


def same_seed_same_state(case: Case) -> None:
    """Two constructions under one seed are equal, and change no default of torch."""
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device()
    first, second = build(case, random_state=False), build(case, random_state=False)
    after = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device()
    require(before == after, f"construction changed {before} to {after}", "leave torch's defaults alone")
    other = state_copy(second)
    for name, tensor in state_copy(first).items():
        require_equal(tensor, other[name], name, "draw from torch's global generator only")


def reset_parameters_redraws(case: Case) -> None:
    """`reset_parameters` gives every parameter a finite value, as a module moved off meta needs."""
    module = build(case)
    if not any(True for _ in module.parameters()):
        return
    require(hasattr(module, "reset_parameters"), "there is no reset_parameters()", "add one")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    with seeded():
        module.reset_parameters()  # type: ignore[operator]
    for name, parameter in module.named_parameters():
        require(
            bool(torch.isfinite(parameter).all()), f"{name} keeps its value", "let reset_parameters draw it"
        )


def output_shape_and_dtype(case: Case) -> None:
    """The output has the case's shape and the input's type, in float32 and bfloat16, and is finite."""
    for dtype in (torch.float32, torch.bfloat16):
        for training in (True, False):
            module = build(case, dtype).train(training)
            with seeded():
                output = module(*draw_inputs(case, dtype))
            got = tuple(output.shape), output.dtype
            require(
                got == (case.output, dtype), f"output {got} for {dtype}", f"should be {case.output}, {dtype}"
            )
            require(bool(torch.isfinite(output).all()), f"output in {dtype} is not finite", "mend the scale")


def autocast(case: Case) -> None:
    """Under bfloat16 autocast it runs forward and backward and stays near its float32 output."""
    module = build(case).eval()
    inputs = draw_inputs(case)
    wanted = _evaluate(module, *inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16), seeded(3):
        output = module(*leaves)
    output.float().sum().backward()
    require(tuple(output.shape) == case.output, f"output {tuple(output.shape)}", f"should be {case.output}")
    scale = max(1.0, float(wanted.abs().max()))
    error = float((output.detach().float() - wanted).abs().max()) / scale
    require(error < 0.1, f"output is off by {error:.2g}", "keep sensitive parts in float32")


def inputs_unmodified(case: Case) -> None:
    """Its inputs are the same after the call, in training and eval mode."""
    for training in (True, False):
        module = build(case).train(training)
        inputs = draw_inputs(case)
        copies = [x.clone() for x in inputs]
        with seeded():
            module(*inputs)
        for index, (x, kept) in enumerate(zip(inputs, copies, strict=True)):
            same = torch.equal(x, kept) and x._version == 0
            require(same, f"input {index} was changed in place", "work on a new tensor")


def eval_is_deterministic(case: Case) -> None:
    """In eval mode two calls give the same output and change no state."""
    module = build(case).eval()
    inputs = draw_inputs(case)
    before = state_copy(module)
    first, second = module(*inputs), module(*inputs)
    require_equal(second, first, "second call", "draw nothing and store nothing in eval mode")
    after = state_copy(module)
    for name, tensor in before.items():
        require_equal(after[name], tensor, name, "change state in training mode only")


def other_sizes(case: Case) -> None:
    """The varied axes take other lengths, and the smallest input works."""
    module = build(case).eval()
    for longer in SIZES[1:]:
        output = _evaluate(module, *draw_inputs(case, longer=longer))
        require(bool(torch.isfinite(output).all()), f"axes {longer} longer: not finite", "mind odd sizes")
    if case.minimal is not None:
        inputs = [torch.ones(case.minimal), *draw_inputs(case)[1:]]
        output = _evaluate(module, *inputs)
        require(bool(torch.isfinite(output).all()), f"input {case.minimal}: not finite", "mind small sizes")


def samples_are_independent(case: Case) -> None:
    """In eval mode a batch of one gives what it gives inside a larger batch."""
    if not case.per_sample:
        return
    module = build(case, torch.float64)
    inputs = draw_inputs(case, torch.float64)
    batch = inputs[0].shape[0]
    whole = _evaluate(module, *inputs)
    for index in (0, batch - 1):
        one = [x[index : index + 1] if x.shape[0] == batch else x for x in inputs]
        mend = "compute per sample, or say per_sample=False in the case"
        require_equal(_evaluate(module, *one), whole[index : index + 1], f"sample {index}", mend, 1e-10)


def channels_last(case: Case) -> None:
    """A channels-last input gives the same values and gradients, in channels-last where the case says so."""
    if len(case.inputs[0]) != 4:
        return
    module = build(case)
    inputs = draw_inputs(case)
    wanted = _evaluate(module, *inputs)
    last = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
    output = _evaluate(module, *last)
    require_equal(output, wanted, "output", "use strides nowhere", 1e-5)
    if case.channels_last and output.ndim == 4:
        kept = output.is_contiguous(memory_format=torch.channels_last)
        require(kept, "the output is not channels-last", "avoid reshape and view between N, C and H, W")
    _, expected = module_gradients(build(case), inputs)
    moved = build(case).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _, gradients = module_gradients(moved, last)
    require_equal_gradients(gradients, expected, "use strides nowhere", 1e-4)


def non_contiguous(case: Case) -> None:
    """Inputs that are views with gaps give the same values."""
    module = build(case)
    inputs = draw_inputs(case)
    wanted = _evaluate(module, *inputs)
    views = [torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0] for x in inputs]
    require_equal(_evaluate(module, *views), wanted, "output", "use reshape instead of view", 1e-5)
    swapped = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs]
    require_equal(_evaluate(module, *swapped), wanted, "output", "use reshape instead of view", 1e-5)


def finite_gradients(case: Case) -> None:
    """Every parameter and every input gets a finite gradient in training mode."""
    _, gradients = module_gradients(build(case), draw_inputs(case))
    require_finite_gradients(gradients)


def finite_gradients_at_zero(case: Case) -> None:
    """An input of zeros gives finite outputs and gradients."""
    module = build(case).eval()
    output, gradients = module_gradients(module, [torch.zeros_like(x) for x in draw_inputs(case)])
    require(bool(torch.isfinite(output).all()), "output is not finite", "add an epsilon")
    for name, gradient in gradients.items():
        finite = gradient is None or bool(torch.isfinite(gradient).all())
        require(finite, f"gradient of {name} is not finite", "add an epsilon inside the square root")


def gradients_are_right(case: Case) -> None:
    """In float64 the gradients of inputs and parameters are those of finite differences."""
    module = build(case, torch.float64)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    parameters = dict(module.named_parameters())

    def function(*tensors: Tensor) -> Tensor:
        named = dict(zip(names, tensors[: len(names)], strict=True))
        with seeded(3):
            return functional_call(module, named, tuple(tensors[len(names) :]))

    leaves = [parameters[name].detach().clone().requires_grad_() for name in names]
    leaves += [x.requires_grad_() for x in draw_inputs(case, torch.float64)]
    gradcheck(function, leaves, fast_mode=True)


def state_round_trip(case: Case) -> None:
    """The state dict has one set of keys in both modes and, loaded strictly, gives the same output bitwise."""
    module = build(case)
    train, evaluation = list(module.train().state_dict()), list(module.eval().state_dict())
    require(train == evaluation, f"keys {train} become {evaluation}", "keep the same state in both modes")
    inputs = draw_inputs(case)
    wanted = _evaluate(module, *inputs)
    require(list(module.state_dict()) == train, "a call changed the keys", "make all state in __init__")
    with seeded(7):
        other = case.make(**case.kwargs)
    other.load_state_dict(module.state_dict(), strict=True)
    for name, tensor in module.state_dict().items():
        require_equal(other.state_dict()[name], tensor, name, "load what was saved")
    mend = "put what the output depends on into parameters, buffers or arguments"
    require_equal(_evaluate(other, *inputs), wanted, "output after loading", mend)


def copies(case: Case) -> None:
    """Deep copies and pickles give the same output and share nothing with the original."""
    module = build(case)
    inputs = draw_inputs(case)
    wanted = _evaluate(module, *inputs)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for what, copied in (
        ("deepcopy", copy.deepcopy(module)),
        ("pickle", pickle.loads(pickle.dumps(module))),
        ("torch.save", torch.load(buffer, weights_only=False)),
    ):
        require_equal(_evaluate(copied, *inputs), wanted, what, "keep plain attributes, no lambdas")
        shared = {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in module.parameters()} - {
            0
        }
        require(not shared, f"{what} shares memory with the original", "do not override copying")


def compiles_once(case: Case) -> None:
    """`torch.compile` gets one whole graph for three sizes, with the outputs and gradients of eager mode."""
    eager, compiled = build(case), build(case)
    call, graphs = compile_counted(compiled)
    # Dynamo may restart within the first call, so what counts is that no later size needs a graph of its own.
    first: int | None = None
    for longer in SIZES:
        inputs = draw_inputs(case, longer=longer)
        wanted, expected = module_gradients(eager, inputs)
        output, gradients = module_gradients(compiled, inputs, call)
        require_equal(output, wanted, f"output, axes {longer} longer", "avoid Python state", 1e-5)
        require_equal_gradients(gradients, expected, "avoid Python state", 1e-4)
        first = len(graphs) if first is None else first
        mend = "read sizes from x.shape and branch on none of them, or leave the axis out of vary"
        require(len(graphs) == first, f"axes {case.vary} {longer} longer need a new graph", mend)


def exports(case: Case) -> None:
    """`torch.export` with the varied axes dynamic gives a program that equals eager mode at other sizes."""
    module = build(case).eval()
    inputs = draw_inputs(case)
    first = case.inputs[0]
    axes = tuple(
        {
            axis: torch.export.Dim.DYNAMIC
            for axis in case.vary
            if axis < len(shape) and shape[axis] == first[axis]
        }
        for shape in case.inputs
    )
    # A size of one is always made a constant, so no dynamic axis starts there.
    if any(first[axis] == 1 for axis in case.vary):
        inputs = draw_inputs(case, longer=2)
    with torch.no_grad():
        program = torch.export.export(
            module, tuple(inputs), dynamic_shapes=dynamic_shapes(module, axes)
        ).module()
        for longer in SIZES[1:]:
            other = draw_inputs(case, longer=longer)
            mend = "compute sizes from x.shape"
            require_equal(program(*other), module(*other), f"axes {longer} longer", mend, 1e-5)


def inductor_agrees(case: Case) -> None:
    """Compiled with inductor, it gives the outputs and gradients of eager mode."""
    # In eval mode: inductor draws other random numbers than eager mode does.
    eager, compiled = build(case).eval(), build(case).eval()
    inputs = draw_inputs(case)
    wanted, expected = module_gradients(eager, inputs)
    output, gradients = module_gradients(compiled, inputs, compile_inductor(compiled))
    require_equal(output, wanted, "output", "report it to torch", 1e-4)
    require_equal_gradients(gradients, expected, "report it to torch", 1e-3)


def dynamic_shapes(module: nn.Module, axes: tuple[dict[int, Any], ...]) -> Any:
    """Return `axes` as `torch.export` wants them: nested where forward collects its inputs with `*args`."""
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    return (axes,) if kinds and kinds[0] is inspect.Parameter.VAR_POSITIONAL else axes


def fails_by_name(case: Case) -> None:
    """Wrong arguments and inputs raise the promised error with the promised message."""
    for wanted in case.raises:
        expect(wanted, lambda wanted=wanted: _broken_call(case, wanted))


def _broken_call(case: Case, wanted: Raises) -> None:
    module = case.make(**{**case.kwargs, **wanted.kwargs})
    if wanted.inputs:
        module(*(torch.zeros(shape) for shape in wanted.inputs))


def expect(wanted: Raises, call: Any) -> None:
    """Require `call()` to raise exactly what `wanted` says."""
    given = f"{dict(wanted.kwargs)}{wanted.inputs or ''}"
    try:
        call()
    except Exception as error:
        same = type(error) is wanted.error and str(error) == wanted.message
        got = f"{type(error).__name__}: {error}"
        require(same, f"{given} raises {got!r}", f"should be {wanted.error.__name__}: {wanted.message!r}")
    else:
        require(False, f"{given} is accepted", f"raise {wanted.error.__name__}: {wanted.message!r}")


def reads_no_fresh_memory(case: Case) -> None:
    """Outputs and gradients do not change when fresh memory is full of NaN."""
    inputs = draw_inputs(case)
    wanted, expected = module_gradients(build(case), inputs)
    with poisoned_memory():
        output, gradients = module_gradients(build(case), inputs)
    require_equal(output, wanted, "output", "write what torch.empty gives before reading it", 1e-6)
    require_equal_gradients(gradients, expected, "initialise buffers", 1e-6)


def merged_equals_branches(case: Case) -> None:
    """A mergeable layer stays as it is, and its merged form is a plain module that gives the same output."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        module = build(case, dtype).eval()
        if not isinstance(module, Mergeable):
            return
        inputs = draw_inputs(case, dtype)
        wanted, before = _evaluate(module, *inputs), state_copy(module)
        with torch.no_grad():
            merged = module.merged()
        require_equal(
            _evaluate(merged, *inputs), wanted, f"merged {dtype}", "mind bias, padding, eps", tolerance
        )
        after = state_copy(module)
        require(before.keys() == after.keys(), "merged() changed the module", "build a new module")
        for name, tensor in before.items():
            require_equal(after[name], tensor, name, "let merged() leave its own tensors alone")
        left = [m for m in reparameterize(module).modules() if isinstance(m, Mergeable)]
        require(not left, "the merged form can be merged again", "return a plain module")


LAYER_CHECKS: tuple[Check, ...] = (
    meta_construction,
    device_and_dtype,
    same_seed_same_state,
    reset_parameters_redraws,
    output_shape_and_dtype,
    autocast,
    inputs_unmodified,
    eval_is_deterministic,
    other_sizes,
    samples_are_independent,
    channels_last,
    non_contiguous,
    finite_gradients,
    finite_gradients_at_zero,
    gradients_are_right,
    state_round_trip,
    copies,
    compiles_once,
    exports,
    fails_by_name,
    reads_no_fresh_memory,
    merged_equals_branches,
)

SLOW_LAYER_CHECKS: tuple[Check, ...] = (inductor_agrees,)


def check_layer(case: Case) -> None:
    """Run the whole contract of a layer over one of its cases.

    Raises:
        ContractError: naming every check that failed, the fault and the mend.
    """
    run_checks(LAYER_CHECKS, case_name(case), case)
