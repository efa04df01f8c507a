"""The Triton kernels of deformable aggregation, in Triton's interpreter, against the equation in float64."""

import pytest
import torch

from omniconv.core.cases import OpCase
from omniconv.ops.deform.api import TABLE, deform_aggregate
from omniconv.ops.deform.cases import CASES
from omniconv.ops.dispatch import explain
from omniconv.testing.harness import compile_counted, run_check
from omniconv.testing.ops import OP_CHECKS, draw_op_inputs, op_name

pytestmark = pytest.mark.usefixtures("triton_interpreter")


def small(id, x, out, longer, longer_out, groups, masked, **options):
    """Return a case with two taps, for the interpreter takes the same time for every tap, however small the maps."""

    def shapes(x, out):
        both = {"x": x, "offset": (x[0], 4 * groups, *out)}
        return both | ({"mask": (x[0], 2 * groups, *out)} if masked else {})

    return OpCase(deform_aggregate, shapes(x, out), options, id, longer=shapes(longer, longer_out))


SMALL = [
    small(
        "unmasked", (2, 3, 5, 4), (2, 2), (3, 3, 7, 6), (3, 3), 3, False,
        kernel_size=(2, 1), stride=2, dilation=(2, 1), offset_scale=0.3,
    ),
    small("taps", (2, 6, 3, 5), (3, 4), (3, 6, 5, 7), (5, 6), 2, True, kernel_size=(1, 2), keep_taps=True),
]  # fmt: skip
# These have tests of their own below, or say nothing about the kernels; tracing takes seconds for every implementation.
OTHERS = ("compiles", "exports", "auto_takes_a_supported_one", "fails_by_name")
CHECKS = [check for check in OP_CHECKS if check.__name__ not in OTHERS]


def draw(channels, size, groups=1, kernel=(3, 3), n=1, dtype=torch.float64, **options):
    """Return arguments of random numbers that want gradients, and the options of the call."""
    torch.manual_seed(0)
    taps = kernel[0] * kernel[1]
    padding = (kernel[0] // 2, kernel[1] // 2)
    options = {"kernel_size": kernel, "padding": padding, **options}
    out = [s + 2 * p - k + 1 for s, p, k in zip(size, padding, kernel, strict=True)]
    shapes = (n, channels, *size), (n, 2 * groups * taps, *out), (n, groups * taps, *out)
    tensors = [torch.randn(shape) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in tensors], options


def differentiated(run, tensors):
    y = run(*tensors)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, weights)]


def assert_equals_reference(tensors, options, tolerance=1e-11):
    found = differentiated(lambda *t: deform_aggregate(*t, **options, impl="triton"), tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = differentiated(lambda *t: TABLE.reference(*TABLE.prepare(*t, **options)), exact)
    for a, b in zip(found, wanted, strict=True):
        limit = tolerance * max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a.double(), b, rtol=0, atol=limit)


@pytest.mark.parametrize("case", SMALL, ids=op_name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_contract_holds(check, case):
    run_check(check, op_name(case), case)


@pytest.mark.parametrize("case", CASES, ids=op_name)
def test_outputs_and_gradients_are_those_of_the_reference(case):
    assert_equals_reference(draw_op_inputs(case, grad=True).values(), case.kwargs, 2e-5)


@pytest.mark.parametrize("depth", [1, 2, 3, 127, 128, 129, 257])
def test_groups_of_all_depths_fall_into_blocks_of_channels(depth):
    assert_equals_reference(*draw(2 * depth, (2, 3), groups=2, kernel=(1, 2), n=2))


@pytest.mark.parametrize("pairs", [2, 127, 128, 129, 257])
@pytest.mark.parametrize("keep_taps", [False, True])
def test_pairs_of_all_numbers_fall_into_blocks(pairs, keep_taps):
    assert_equals_reference(*draw(2, (pairs - 1, 1), kernel=(2, 1), n=2, keep_taps=keep_taps))


def test_kernels_may_be_large():
    assert_equals_reference(*draw(3, (4, 3), kernel=(2, 31)))


def test_compiled_and_exported_programs_hold_the_kernels():
    class Module(torch.nn.Module):
        def forward(self, x, offset):
            return deform_aggregate(x, offset, kernel_size=(1, 2), padding=(0, 1), impl="triton")

    compiled, graphs = compile_counted(Module(), "aot_eager")
    inputs = [draw(6, size, groups=2, kernel=(1, 2), n=n)[0][:2] for size, n in (((5, 10), 2), ((7, 13), 3))]
    for tensors in inputs:
        for a, b in zip(differentiated(compiled, tensors), differentiated(Module(), tensors), strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 2, "one forward and one backward for both sizes"
    sizes = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    with torch.no_grad():
        program = torch.export.export(Module(), tuple(inputs[0]), dynamic_shapes=(sizes, sizes)).module()
        torch.testing.assert_close(program(*inputs[1]), Module()(*inputs[1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_keeps_its_positions(dtype):
    """Neighbouring places of a map wider than half precision counts are told apart."""
    (x, offset, mask), options = draw(2, (1, 4100), kernel=(1, 1), dtype=dtype)
    still = torch.zeros_like(offset)
    y = deform_aggregate(x, still, mask, **options, impl="triton")
    assert torch.equal(y, x * mask)


@pytest.mark.parametrize(
    "types", [(torch.float16, torch.float32, torch.float32), (torch.float32, torch.float64, None)]
)
def test_types_may_differ(types):
    tensors, options = draw(6, (4, 5), groups=2)
    tensors = [t.detach().to(of).requires_grad_() for t, of in zip(tensors, types, strict=True) if of]
    found, wanted = (
        differentiated(lambda *t, impl=impl: deform_aggregate(*t, **options, impl=impl), tensors)
        for impl in ("triton", "torch")
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("wild", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_positions_that_are_no_place_on_the_map_count_as_outside(wild):
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    offset = torch.full((1, 18, 4, 4), wild, requires_grad=True)
    y = deform_aggregate(x, offset, padding=1, impl="triton")
    y.sum().backward()
    for t in (y, x.grad, offset.grad):
        assert torch.equal(t, torch.zeros_like(t))


def test_an_empty_batch_gives_an_empty_batch():
    x, offset = torch.empty(0, 4, 5, 5), torch.empty(0, 18, 5, 5, requires_grad=True)
    y = deform_aggregate(x, offset, padding=1, impl="triton")
    assert y.shape == (0, 4, 5, 5)
    y.sum().backward()
    assert offset.grad is not None


def reason(*tensors, **options):
    return next(r.reason for r in explain(deform_aggregate, *tensors, **options).rows if r.name == "triton")


def test_where_it_cannot_run_it_says_why(monkeypatch):
    (x, offset, mask), options = draw(2, (3, 3))
    assert reason(x, offset, mask, **options) is None
    assert explain(deform_aggregate, x, offset, mask, **options).chosen != "triton"
    assert reason(x, offset, mask.to(torch.int64), **options) == (
        "it is for float16, bfloat16, float32 and float64, not torch.int64"
    )
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in reason(x, offset, mask, **options)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert reason(x, offset, mask, **options) == "it is for CUDA, not cpu"


def test_the_gradient_of_x_has_no_fixed_order(monkeypatch):
    (x, offset, mask), options = draw(2, (3, 3))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "in no fixed order" in reason(x, offset, mask, **options)
    assert reason(x.detach(), offset, mask, **options) is None
    monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: True)
    assert reason(x, offset, mask, **options) is None
