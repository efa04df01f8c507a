"""The contract catches networks that are broken on purpose, each by the check meant for it."""

import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.models import factory
from omniconv.models.backbone import Backbone, Feature, FeatureInfo, Variant
from omniconv.testing import models
from omniconv.testing.harness import ContractError, run_check


@dataclass(frozen=True)
class Config:
    width: int = 8


@dataclass
class LooseConfig:
    width: int = 8


class Pair(nn.Module):
    """Two branches that merge into one convolution."""

    def __init__(self, width, off=0.0):
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 1)
        self.off = off

    def forward(self, x):
        return self.a(x) + self.b(x)

    def merged(self):
        conv = nn.Conv2d(self.a.in_channels, self.a.out_channels, 3, padding=1).to(self.a.weight)
        weight = self.a.weight + F.pad(self.b.weight, (1, 1, 1, 1))
        conv.load_state_dict({"weight": weight, "bias": self.a.bias + self.b.bias + self.off})
        return conv


class Net(Backbone):
    """A correct network of two maps."""

    reductions = (2, 8)
    channels_told = 16
    last = "stage"
    off = 0.0

    def __init__(self, config, num_classes=1000, in_chans=3):
        super().__init__()
        self.config = config
        width = config.width
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.GELU()
        )
        self.stage = nn.Sequential(Pair(width, self.off), nn.Conv2d(width, 2 * width, 4, 4, 2), nn.GELU())
        self.num_features = 2 * width
        told = zip((width, self.channels_told), self.reductions, ("stem", self.last), strict=True)
        self.feature_info = FeatureInfo(Feature(num_chs=c, reduction=r, module=m) for c, r, m in told)
        self.reset_classifier(num_classes)

    def forward_stages(self, x):
        stem = self.stem(x)
        return [stem, self.stage(stem)]

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def get_classifier(self):
        return self.fc

    def reset_classifier(self, num_classes):
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


class Huge(Net):
    def __init__(self, config, num_classes=1000, in_chans=3):
        super().__init__(config, num_classes, in_chans)
        self.extra = nn.Parameter(torch.zeros(1000, 1000))


class WrongStride(Net):
    reductions = (2, 4)


class WrongChannels(Net):
    channels_told = 24


class WrongModule(Net):
    last = "stage.1"


class HeadFirst(Net):
    """Registers a module of its head before its stages, where `features_only` cannot tell it for one."""

    def __init__(self, config, num_classes=1000, in_chans=3):
        super().__init__(config, num_classes, in_chans)
        stages = {name: self._modules.pop(name) for name in ("stem", "stage", "fc")}
        self.norm = nn.LayerNorm(self.num_features)
        self._modules.update(stages)

    def forward_head(self, x, pre_logits=False):
        x = self.norm(x.mean((2, 3)))
        return x if pre_logits else self.fc(x)


class WrongMerge(Net):
    off = 0.1


class PinnedToCpu(Net):
    def __init__(self, config, num_classes=1000, in_chans=3):
        super().__init__(config, num_classes, in_chans)
        self.register_buffer("scale", torch.ones(1, device="cpu"))


class FreshParameter(Net):
    def __init__(self, config, num_classes=1000, in_chans=3):
        super().__init__(config, num_classes, in_chans)
        self.scale = nn.Parameter(torch.full((1,), float("nan")))


class FixedHead(Net):
    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x, pre_logits).float()


class LargeImagesOnly(Net):
    def forward_stages(self, x):
        if x.shape[2] < 60:
            raise ValueError("too small")
        return super().forward_stages(x)


class ChangesImages(Net):
    def forward_stages(self, x):
        return super().forward_stages(x.mul_(2))


class SeesOthers(Net):
    def forward_stages(self, x):
        return super().forward_stages(x - x.mean())


class ReadsStrides(Net):
    def forward_stages(self, x):
        return super().forward_stages(x * x.stride(3))


class DeadParameter(Net):
    def __init__(self, config, num_classes=1000, in_chans=3):
        super().__init__(config, num_classes, in_chans)
        self.unused = nn.Linear(2, 2)


class WrongGradient(Net):
    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x + (x.detach() - x) * 0.5, pre_logits)


class ScalesLogits(Net):
    def forward(self, x):
        return super().forward(x) * 2


class KeepsOldHead(Net):
    def reset_classifier(self, num_classes):
        if not hasattr(self, "fc"):
            super().reset_classifier(num_classes)


class ThreeChannels(Net):
    def __init__(self, config, num_classes=1000, in_chans=3):
        super().__init__(config, num_classes, 3)


class DeploysItself(Net):
    def deploy(self):
        self.stage[0] = self.stage[0].merged()
        return super().deploy()


class HiddenState(Net):
    def __init__(self, config, num_classes=1000, in_chans=3):
        super().__init__(config, num_classes, in_chans)
        self.secret = float(torch.rand((), device="cpu"))

    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x * self.secret, pre_logits)


class KeepsLambda(Net):
    def __init__(self, config, num_classes=1000, in_chans=3):
        super().__init__(config, num_classes, in_chans)
        self.act = lambda x: x


class SquareOnly(Net):
    def forward_stages(self, x):
        return super().forward_stages(x * (2.0 if x.shape[2] == 64 else 1.0))


class FreshMemory(Net):
    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x + 0 * torch.empty_like(x), pre_logits)


FAULTS = [
    (Huge, models.is_small, "it has 1,0"),
    (PinnedToCpu, models.meta_construction, "scale is on cpu"),
    (FreshParameter, models.same_seed_same_state, "scale"),
    (FixedHead, models.output_shape_and_dtype, "torch.float32"),
    (LargeImagesOnly, models.small_and_odd_sizes, "too small"),
    (ChangesImages, models.inputs_unmodified, "changed in place"),
    (SeesOthers, models.samples_are_independent, "sample 0: values differ"),
    (ReadsStrides, models.channels_last, "logits: values differ"),
    (DeadParameter, models.finite_gradients, "unused.weight gets no gradient"),
    (WrongGradient, models.gradients_are_right, "Jacobian mismatch"),
    (WrongStride, models.features_match_their_description, "map 1 grows by [8, 12] pixels"),
    (WrongChannels, models.features_match_their_description, "map 1 has 16 channels, not 24"),
    (WrongModule, models.features_match_their_description, "map 1 is not the output of stage.1"),
    (HeadFirst, models.features_match_their_description, "features_only keeps backbone.norm.weight"),
    (ScalesLogits, models.head_follows_features, "forward_head: values differ"),
    (KeepsOldHead, models.classifier_can_be_replaced, "after reset to 7"),
    (ThreeChannels, models.any_number_of_channels, "RuntimeError"),
    (WrongMerge, models.deploy_gives_the_same, "logits in torch.float32: values differ"),
    (DeploysItself, models.deploy_gives_the_same, "deploy changed the network's modules"),
    (HiddenState, models.state_round_trip, "logits after loading: values differ"),
    (KeepsLambda, models.copies, "lambda"),
    (SquareOnly, models.compiles_once, "needs a new graph"),
    (SquareOnly, models.exports, "onstraint"),
    (FreshMemory, models.reads_no_fresh_memory, "write what torch.empty gives"),
]


@pytest.fixture
def register(monkeypatch):
    """Return a function that makes a network known as `toy_test`."""

    def add(make, config=Config(), **figures):
        variant = Variant(make, config, size=64, **figures)
        monkeypatch.setitem(factory._MODELS._entries, "toy_test", (sys.modules[__name__], variant))
        return "toy_test"

    return add


@pytest.mark.parametrize(("make", "check", "words"), FAULTS, ids=[m.__name__ for m, _, _ in FAULTS])
def test_broken_network_is_caught(assert_caught, register, make, check, words):
    assert_caught(check, register(make), words)


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"params": 21_000}, "19,952 parameters instead of 21,000"),
        ({"params": 19_700}, "19,952 parameters instead of 19,700"),
        ({"macs": 1.2e6}, "multiply-adds instead of 1,200,000"),
        ({"params": 20_100, "deployed": True}, "19,880 parameters"),
    ],
)
def test_wrong_counts_are_caught(assert_caught, register, figures, words):
    assert_caught(models.published_counts, register(Net, **figures), words)


def test_loose_configuration_is_caught(assert_caught, register):
    words = "LooseConfig can be changed"
    assert_caught(models.configuration_is_frozen_data, register(Net, LooseConfig()), words)


def test_wrong_messages_are_caught(assert_caught, register, monkeypatch):
    register(Net)
    monkeypatch.setattr(factory, "closest", lambda word, known: "")
    assert_caught(models.unknown_names_are_explained, "toy_test", "did you mean width?")


def test_every_model_check_has_a_fault():
    elsewhere = {
        models.published_counts,
        models.configuration_is_frozen_data,
        models.unknown_names_are_explained,
    }
    assert {check for _, check, _ in FAULTS} | elsewhere == set(models.MODEL_CHECKS)


def test_correct_network_passes(register):
    models.check_model(register(Net, params=19_952, macs=1_058_432))


def test_published_networks_are_only_counted(register, monkeypatch):
    variant = Variant(DeadParameter, Config(), params=19_958, size=64)
    monkeypatch.setitem(factory._MODELS._entries, "toy", (sys.modules[__name__], variant))
    models.check_model("toy")
    with pytest.raises(ContractError, match="finite_gradients"):
        run_check(models.finite_gradients, "toy", "toy")


@pytest.mark.parametrize(
    ("published", "relative", "wanted"),
    [
        (25_557_032, 0.01, 255_570.32),  # all digits printed: the relative limit
        (0.27e6, 0.01, 5_000),  # 0.27 M stands for 0.265 to 0.275
        (5.4e6, 0.01, 54_000),
        (1.1e9, 0.03, 50e6),
        (4e9, 0.03, 120e6),  # 4.0, not 4
    ],
)
def test_count_tolerance(published, relative, wanted):
    assert models.count_tolerance(published, relative) == pytest.approx(wanted)
