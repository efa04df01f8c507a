"""RecNeXt: its deployed form and the official names."""

import pytest
import torch
from torch import nn

from omniconv.models.factory import create_model
from omniconv.models.image.recnext import OFFICIAL_NAMES, RecNeXtConfig
from tests.models.image.names import assert_become_ours, batch_norm, layer


@pytest.mark.parametrize(("name", "count"), [("recnext_m0", 2.502e6), ("recnext_m3", 8.220e6)])
def test_counts_of_the_fused_form(name, count):
    model = create_model(name, device="meta").deploy()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=5e-3)


def test_two_classifiers_become_their_mean():
    torch.manual_seed(0)
    classifier = create_model("recnext_test", num_classes=5).get_classifier().double().eval()
    for norm in (classifier.head.norm, classifier.head_dist.norm):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(3, 16, dtype=torch.float64)
    linear = classifier.merged()
    assert isinstance(linear, nn.Linear)
    torch.testing.assert_close(linear(x), (classifier.head(x) + classifier.head_dist(x)) / 2)


def _conv_norm(*names: str) -> list[str]:
    convs, norms = ([f"{name}.{part}" for name in names] for part in ("conv", "norm"))
    return [*layer(*convs, bias=False), *batch_norm(*norms)]


def test_official_names():
    official = _conv_norm("stem.stem.0", "stem.stem.2")
    for head in ("head.head", "head.head_dist"):
        official += [*batch_norm(f"{head}.norm"), *layer(f"{head}.linear")]
    official += layer("stages.1.downsample.token_mixer")
    for part, levels in (("stages.0.blocks.0", 2), ("stages.1.blocks.0", 1), ("stages.1.downsample", 0)):
        official += [
            *batch_norm(f"{part}.norm"),
            *_conv_norm(f"{part}.channel_mixer.0", f"{part}.channel_mixer.2"),
        ]
        if levels:
            convs = [f"{part}.token_mixer.convs.{level}" for level in range(levels + 1)]
            official += layer(f"{part}.token_mixer.down", *convs, bias=False)
    assert_become_ours(official, OFFICIAL_NAMES, create_model("recnext_test", device="meta"))


def test_every_stage_needs_its_levels():
    with pytest.raises(ValueError, match="depths and levels must be equally long"):
        RecNeXtConfig(levels=(1,))
