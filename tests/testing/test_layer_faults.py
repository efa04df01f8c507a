"""The contract catches layers that are broken on purpose, each by the check meant for it."""

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.testing import layers
from omniconv.testing.harness import ContractError, run_check


class Toy(nn.Module):
    """A correct layer: a convolution, a gate, a constant, a train-time and a merged form."""

    def __init__(self, channels, *, device=None, dtype=None):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive: got {channels}")
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, device=device, dtype=dtype)
        self.skip = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def reset_parameters(self):
        self.conv.reset_parameters()
        nn.init.ones_(self.skip)

    def forward(self, x):
        return self.conv(x) + self.skip[:, None, None] * x


class MergeableToy(Toy):
    def merged(self):
        conv = nn.Conv2d(
            self.conv.in_channels, self.conv.out_channels, 3, padding=1, groups=self.conv.groups
        ).to(self.conv.weight.dtype)
        weight = self.conv.weight.clone()
        weight[:, 0, 1, 1] += self.skip
        conv.load_state_dict({"weight": weight, "bias": self.conv.bias})
        return conv


def case(make, **more):
    raises = (Raises(ValueError, "channels must be positive: got 0", {"channels": 0}),)
    defaults = {"inputs": ((2, 4, 7, 5),), "output": (2, 4, 7, 5), "minimal": (1, 4, 1, 1), "raises": raises}
    return Case(make, {"channels": 4}, **{**defaults, **more})


class IgnoresSeed(Toy):
    def reset_parameters(self):
        super().reset_parameters()

    def __init__(self, channels, *, device=None, dtype=None):
        super().__init__(channels, device=device, dtype=dtype)
        with torch.no_grad():
            self.skip += float(int.from_bytes(os.urandom(2), "big")) / 65536


class ChangesDefaults(Toy):
    def __init__(self, channels, *, device=None, dtype=None):
        super().__init__(channels, device=device, dtype=dtype)
        torch.set_grad_enabled(False)


class ChangesInput(Toy):
    def forward(self, x):
        return self.conv(x.clamp_(min=0))


class DeadParameter(Toy):
    def forward(self, x):
        return self.conv(x)


class DetachedInput(Toy):
    def forward(self, x):
        return self.conv(x.detach()) * self.skip[:, None, None]


class SpecialisesOnSize(Toy):
    def forward(self, x):
        height = int(x.shape[2])
        return (
            self.conv(x) * (height % 7 + 1) * self.skip[:, None, None] if height > 7 else super().forward(x)
        )


class ConstantSize(Toy):
    def forward(self, x):
        self.size = getattr(self, "size", None) or int(x.shape[2])
        return super().forward(x)[:, :, : self.size]


class OddSizesOnly(Toy):
    def forward(self, x):
        return super().forward(x).reshape(*x.shape[:2], 7, -1).reshape(x.shape)


class LosesChannelsLast(Toy):
    def forward(self, x):
        return super().forward(x).contiguous()


class ReadsStrides(Toy):
    def forward(self, x):
        return super().forward(x) + (x.stride(1) == 1) + x.stride(3)


class NeedsContiguous(Toy):
    def forward(self, x):
        return super().forward(x.view(x.shape[0], -1).view(x.shape))


class SeesOtherSamples(Toy):
    def forward(self, x):
        return super().forward(x - x.mean(0, keepdim=True))


class KeysDependOnMode(Toy):
    def train(self, mode=True):
        super().train(mode)
        if mode:
            self._buffers.pop("cached", None)
        else:
            self.register_buffer("cached", torch.zeros(1))
        return self


class HiddenState(Toy):
    def __init__(self, channels, *, device=None, dtype=None):
        super().__init__(channels, device=device, dtype=dtype)
        self.secret = float(torch.rand((), device="cpu"))

    def forward(self, x):
        return super().forward(x) * self.secret


class EvalChangesState(Toy):
    def __init__(self, channels, *, device=None, dtype=None):
        super().__init__(channels, device=device, dtype=dtype)
        self.register_buffer("count", torch.zeros((), device=device))

    def forward(self, x):
        self.count += 1
        return super().forward(x)


class RandomInEval(Toy):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, training=True))


class KeepsLambda(Toy):
    def __init__(self, channels, *, device=None, dtype=None):
        super().__init__(channels, device=device, dtype=dtype)
        self.act = lambda x: x

    def forward(self, x):
        return self.act(super().forward(x))


class WrongMessage(Toy):
    def __init__(self, channels, *, device=None, dtype=None):
        if channels < 1:
            raise ValueError("bad channels")
        super().__init__(channels, device=device, dtype=dtype)


class AcceptsAnything(Toy):
    def __init__(self, channels, *, device=None, dtype=None):
        super().__init__(max(1, channels), device=device, dtype=dtype)


class NanGradient(Toy):
    def forward(self, x):
        return super().forward(x) * x.square().sum((2, 3), keepdim=True).sqrt()


class LosesPrecision(Toy):
    def forward(self, x):
        return super().forward(x.to(torch.float32).to(x.dtype))


class WrongGradient(Toy):
    def forward(self, x):
        y = super().forward(x)
        return y + (y.detach() - y) * 0.5


class ForcesFloat32(Toy):
    def forward(self, x):
        return super().forward(x).float()


class BreaksAutocast(Toy):
    def forward(self, x):
        return torch.einsum("ncij,ck->nkij", self.conv(x), torch.eye(x.shape[1]).double()).to(x.dtype) + (
            self.skip[:, None, None] * x
        )


class OverflowsInAutocast(Toy):
    def forward(self, x):
        y = self.conv(x)
        return (y + 1000 - 1000) + self.skip[:, None, None] * x


class ReadsFreshMemory(Toy):
    def forward(self, x):
        return super().forward(x) + 0 * torch.empty_like(x)


class PinnedToCpu(Toy):
    def __init__(self, channels, *, device=None, dtype=None):
        super().__init__(channels, device=device, dtype=dtype)
        self.register_buffer("eye", torch.eye(channels, device="cpu"))


class NoDevice(Toy):
    def __init__(self, channels):
        super().__init__(channels)


class ForgetsDtype(Toy):
    def __init__(self, channels, *, device=None, dtype=None):
        super().__init__(channels, device=device)


class ForgetsReset(Toy):
    def reset_parameters(self):
        self.conv.reset_parameters()


class BreaksGraph(Toy):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


class MergesWrongly(MergeableToy):
    def merged(self):
        conv = super().merged()
        conv.bias.data += 0.01
        return conv


class MergesItself(MergeableToy):
    def merged(self):
        conv = super().merged()
        self.conv.weight.zero_()
        return conv


LAYER_FAULTS = [
    (IgnoresSeed, layers.same_seed_same_state, "skip: values differ"),
    (ChangesDefaults, layers.same_seed_same_state, "construction changed"),
    (ChangesInput, layers.inputs_unmodified, "input 0 was changed in place"),
    (DeadParameter, layers.finite_gradients, "skip gets no gradient"),
    (DetachedInput, layers.finite_gradients, "input 0 gets no gradient"),
    (SpecialisesOnSize, layers.compiles_once, "need a new graph"),
    (SpecialisesOnSize, layers.exports, "Constraints violated"),
    (ConstantSize, layers.compiles_once, "axes (0, 2, 3) 1 longer need a new graph"),
    (OddSizesOnly, layers.other_sizes, "shape"),
    (LosesChannelsLast, layers.channels_last, "the output is not channels-last"),
    (ReadsStrides, layers.channels_last, "output: values differ"),
    (ReadsStrides, layers.non_contiguous, "output: values differ"),
    (NeedsContiguous, layers.non_contiguous, "view"),
    (SeesOtherSamples, layers.samples_are_independent, "sample 0: values differ"),
    (KeysDependOnMode, layers.state_round_trip, "keep the same state in both modes"),
    (HiddenState, layers.state_round_trip, "output after loading: values differ"),
    (EvalChangesState, layers.eval_is_deterministic, "count: values differ"),
    (RandomInEval, layers.eval_is_deterministic, "second call: values differ"),
    (KeepsLambda, layers.copies, "lambda"),
    (WrongMessage, layers.fails_by_name, "raises 'ValueError: bad channels'"),
    (AcceptsAnything, layers.fails_by_name, "{'channels': 0} is accepted"),
    (NanGradient, layers.finite_gradients_at_zero, "is not finite"),
    (LosesPrecision, layers.gradients_are_right, "Jacobian mismatch"),
    (WrongGradient, layers.gradients_are_right, "Jacobian mismatch"),
    (ForcesFloat32, layers.output_shape_and_dtype, "for torch.bfloat16"),
    (BreaksAutocast, layers.autocast, "RuntimeError"),
    (OverflowsInAutocast, layers.autocast, "output is off by"),
    (ReadsFreshMemory, layers.reads_no_fresh_memory, "write what torch.empty gives"),
    (PinnedToCpu, layers.meta_construction, "eye is on cpu"),
    (NoDevice, layers.device_and_dtype, "it takes no device and no dtype"),
    (ForgetsDtype, layers.device_and_dtype, "skip is torch.float32 on meta"),
    (ForgetsReset, layers.reset_parameters_redraws, "skip keeps its value"),
    (BreaksGraph, layers.compiles_once, "Unsupported: "),
    (MergesWrongly, layers.merged_equals_branches, "merged torch.float32: values differ"),
    (MergesItself, layers.merged_equals_branches, "conv.weight: values differ"),
]


@pytest.mark.parametrize(
    ("make", "check", "words"), LAYER_FAULTS, ids=[f"{m.__name__}-{c.__name__}" for m, c, _ in LAYER_FAULTS]
)
def test_broken_layer_is_caught(assert_caught, make, check, words):
    with torch.set_grad_enabled(True):
        assert_caught(check, case(make), words)


def test_every_layer_check_has_a_fault():
    assert {check for _, check, _ in LAYER_FAULTS} == set(layers.LAYER_CHECKS)


@pytest.mark.parametrize("make", [Toy, MergeableToy])
def test_correct_layer_passes(make):
    layers.check_layer(case(make))


def test_whole_contract_names_every_failing_check(monkeypatch):
    monkeypatch.setattr(layers, "LAYER_CHECKS", (layers.finite_gradients, layers.copies, layers.autocast))
    with pytest.raises(ContractError, match="DeadParameter fails finite_gradients") as caught:
        layers.check_layer(case(DeadParameter))
    assert caught.value.check == "finite_gradients"
    with pytest.raises(ContractError, match=r"(?s)fails copies.*fails autocast") as caught:
        layers.check_layer(case(type("Both", (KeepsLambda, OverflowsInAutocast), {})))
    assert caught.value.check == "copies"


def test_checks_leave_the_global_generator_alone():
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    run_check(layers.same_seed_same_state, "Toy", case(Toy))
    run_check(layers.finite_gradients, "Toy", case(Toy))
    assert torch.equal(torch.rand(3), wanted)
