"""The unified network: only the mixer differs, and anybody's mixer fits."""

import pytest
import torch
from torch import nn

from omniconv.core.errors import UsageError
from omniconv.layers.attention.window import WindowAttention
from omniconv.models.factory import create_model
from omniconv.models.image.stm import MIXERS


def shapes(mixer: str) -> dict[str, torch.Size]:
    state = create_model("stm_halo_micro", mixer=mixer, device="meta").state_dict()
    return {name: value.shape for name, value in state.items() if ".token_mixer." not in name}


def test_networks_differ_in_their_mixers_alone():
    expected = shapes("depthwise")
    assert all(shapes(mixer) == expected for mixer in MIXERS)


@pytest.mark.parametrize("size", ["micro", "tiny", "small", "base"])
def test_mixers_of_a_size_agree_in_parameters(size):
    paper = ("halo", "reduction", "window", "depthwise", "dcnv3")
    models = [create_model(f"stm_{mixer}_{size}", device="meta") for mixer in paper]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert max(counts) <= 1.1 * min(counts)


def test_a_mixer_of_ones_own(monkeypatch):
    monkeypatch.setitem(MIXERS, "shift", lambda channels, place: nn.Conv2d(channels, channels, 1))
    model = create_model("stm_test", mixer="shift", num_classes=3)
    assert model(torch.randn(1, 3, 32, 40)).shape == (1, 3)
    with pytest.raises(UsageError, match="no mixer 'shif'; did you mean shift"):
        create_model("stm_test", mixer="shif")


def test_every_other_window_is_shifted():
    model = create_model("stm_window_micro", device="meta")
    shifts = [module.shift for module in model.modules() if isinstance(module, WindowAttention)]
    assert shifts == [0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 0, 3]
