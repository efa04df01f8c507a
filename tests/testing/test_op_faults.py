"""The contract catches operators that are broken on purpose, each by the check meant for it."""

import sys
from types import ModuleType

import pytest
import torch

from omniconv.core.cases import OpCase, Raises
from omniconv.ops.dispatch import Implementation, Table, explain
from omniconv.testing import ops
from omniconv.testing.find import missing_cases


def prepare(x, w):
    if x.shape[1:2] != w.shape:
        raise ValueError(f"w must have {x.shape[1]} elements: got {tuple(w.shape)}")
    return x, w.reshape(-1, *(1,) * (x.ndim - 2))


def no_float16(x, w):
    return None if x.dtype != torch.float16 else f"it is not for {x.dtype}"


class Careless(Table):
    """Asks no implementation whether it can take a call."""

    def select(self, impl, call):
        return self.implementations[1] if impl == "auto" else super().select(impl, call)


@pytest.fixture
def make_case(monkeypatch):
    """Return a function that makes a case of y = x * w with a second implementation that may be broken."""

    def make(
        run=lambda x, w: w * x, supports=no_float16, seconds=0.5, choose=None, table=Table, message=None
    ):
        made = table(
            "times",
            prepare,
            lambda x, w: x * w,
            (
                Implementation("torch", lambda x, w: x * w, lambda x, w: None, lambda x, w: 1.0),
                Implementation("other", run, supports, lambda x, w: seconds),
            ),
        )

        def times(x, w, *, impl="auto"):
            call = made.prepare(x, w)
            return (choose or made.select)(impl, call).run(*call)

        module = ModuleType("toy_op")
        module.TABLE = made
        times.__module__ = "toy_op"
        monkeypatch.setitem(sys.modules, "toy_op", module)
        text = message or "w must have 3 elements: got (7,)"
        raises = (Raises(ValueError, text, inputs=((2, 3), (7,))),)
        return OpCase(times, {"x": (2, 5, 3, 7), "w": (5,)}, raises=raises)

    return make


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum((0, 2, 3)).reshape(-1, 1, 1) * 0.5


class NotTwice(NoGradient):
    @staticmethod
    def backward(ctx, grad):
        x, w = (tensor.detach() for tensor in ctx.saved_tensors)
        return grad * w, (grad * x).sum((0, 2, 3)).reshape(-1, 1, 1)


class NeedsBoth(NoGradient):
    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        both = all(ctx.needs_input_grad)
        return (grad * w if both else None), ((grad * x).sum((0, 2, 3)).reshape(-1, 1, 1) if both else None)


class Named:
    """Chooses as a table does, but falls back without a word where an implementation cannot take a call."""

    def __init__(self, always):
        self.always = always

    def __call__(self, impl, call):
        plain = Implementation("torch", lambda x, w: x * w, lambda x, w: None, lambda x, w: 1.0)
        return plain if self.always or no_float16(*call) else ROUNDABOUT


def roundabout(x, w):
    return (x.unsqueeze(0) * w).squeeze(0)


ROUNDABOUT = Implementation("other", roundabout, no_float16, lambda x, w: 1.0)


def only_float32(x, w):
    return None if x.dtype in (torch.float32, torch.float64) else f"it is not for {x.dtype}"


def coarse(x, w):
    return (x / 3 * w) * 3 if x.dtype in (torch.bfloat16, torch.float16) else x * w


@torch.library.custom_op("toy::times", mutates_args=())
def misdescribed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * w


@misdescribed.register_fake
def _(x, w):
    return x.new_empty(x.shape[1:])


def whimsical():
    answers = iter([None, "it is Monday"] * 1000)
    return lambda x, w: next(answers)


FAULTS = [
    (dict(run=lambda x, w: x * w * 1.001), ops.equals_reference, "auto torch.float32: values differ"),
    (dict(run=NoGradient.apply), ops.equals_reference, "gradient of w: values differ"),
    (dict(run=NoGradient.apply), ops.gradients_are_right, "Jacobian mismatch"),
    (dict(run=NotTwice.apply), ops.gradients_are_right, "Error"),
    (dict(run=NeedsBoth.apply), ops.each_gradient_alone, "Error"),
    (dict(run=lambda x, w: (x * w).contiguous()), ops.layouts, "other does not keep channels-last"),
    (dict(run=lambda x, w: x * w + (x.stride(-1) - 1)), ops.layouts, "other with gaps: values differ"),
    (dict(run=lambda x, w: coarse(coarse(x, w), w) / w), ops.low_precision, "plain torch by"),
    (
        dict(choose=Named(False), supports=only_float32),
        ops.named_never_falls_back,
        "a call that it cannot take",
    ),
    (dict(choose=Named(True), run=roundabout), ops.named_never_falls_back, "runs something else"),
    (dict(table=Careless, supports=only_float32), ops.auto_takes_a_supported_one, "auto picks other"),
    (dict(supports=whimsical()), ops.auto_takes_a_supported_one, "changes its mind"),
    (dict(run=lambda x, w: x * w * (torch._dynamo.graph_break() is None)), ops.compiles, "Unsupported"),
    (dict(run=lambda x, w: x * w if x.shape[1] == 5 and x.shape[0] < 3 else w * x), ops.exports, "onstraint"),
    (dict(run=misdescribed), ops.registered_operators_are_sound, "FakeTensor"),
    (dict(run=lambda x, w: x * w + 0 * torch.empty_like(x)), ops.reads_no_fresh_memory, "other:"),
    (dict(message="no"), ops.fails_by_name, "should be ValueError: 'no'"),
]


@pytest.mark.parametrize(
    ("broken", "check", "words"), FAULTS, ids=[f"{i}-{c.__name__}" for i, (_, c, _) in enumerate(FAULTS)]
)
def test_broken_operator_is_caught(assert_caught, make_case, broken, check, words):
    assert_caught(check, make_case(**broken), words)


def test_every_op_check_has_a_fault():
    assert {check for _, check, _ in FAULTS} == set(ops.OP_CHECKS)


def test_correct_operator_passes(make_case):
    ops.check_op(make_case())


def test_explain_tells_choice_and_reasons(make_case):
    op = make_case(supports=only_float32).op
    x, w = torch.ones(2, 3), torch.ones(3)
    assert explain(op, x, w).chosen == "other"
    told = explain(op, x.half(), w.half())
    assert told.chosen == "torch"
    assert str(told) == "times: torch\n  * torch: about 1e+03 ms\n    other: it is not for torch.float16"


def test_plain_torch_gives_way_only_to_a_clear_gain(make_case):
    x, w = torch.ones(2, 3), torch.ones(3)
    assert explain(make_case(seconds=0.9).op, x, w).chosen == "torch"
    assert explain(make_case(seconds=0.7).op, x, w).chosen == "other"


def test_unknown_implementation_names_the_nearest(make_case):
    op = make_case().op
    with pytest.raises(ValueError, match="times has no impl 'othr'; did you mean other"):
        op(torch.ones(2, 3), torch.ones(3), impl="othr")


def test_table_begins_with_plain_torch():
    row = Implementation("fast", lambda x: x, lambda x: None, lambda x: 1.0)
    with pytest.raises(ValueError, match="the first implementation of f must be 'torch'"):
        Table("f", lambda x: (x,), lambda x: x, (row,))


def test_operators_without_cases_are_missed(tmp_path, monkeypatch):
    (tmp_path / "toy_ops").mkdir()
    (tmp_path / "toy_ops" / "__init__.py").write_text("")
    (tmp_path / "toy_ops" / "scale.py").write_text(
        "__all__ = ['scale']\ndef scale(x, *, impl='auto'): return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert missing_cases("toy_ops", functions=True) == ["toy_ops.scale.scale"]
    assert missing_cases("toy_ops") == []
