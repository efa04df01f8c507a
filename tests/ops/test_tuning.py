"""Choices are measured, kept for later programs, and used for the calls that they were measured for."""

import json

import pytest
import torch
from torch import nn

import omniconv
from omniconv.ops import choices, depthwise_conv, explain, tuning


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choices.known_choices.cache_clear()
    yield tmp_path
    choices.known_choices.cache_clear()


def network():
    return omniconv.accelerate(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)))


def pretend(monkeypatch, **milliseconds):
    monkeypatch.setattr(tuning, "_measure", lambda *_: dict(milliseconds))


def test_every_implementation_is_timed_with_the_gradients_that_are_wanted():
    told = omniconv.tune(network(), torch.randn(2, 3, 9, 7), seconds=0.01)
    (timing,) = told.timings
    assert timing.op == "depthwise_conv"
    assert set(timing.milliseconds) == {"torch", "channels_last", "direct", "fft"}
    assert all(value > 0 for value in timing.milliseconds.values())
    assert timing.chosen in str(told)
    assert timing.call.count(" grad") == 3  # the input of the second layer, its weight and its bias
    (timing,) = omniconv.tune(network().eval(), torch.randn(2, 3, 9, 7), seconds=0.01).timings
    assert " grad" not in timing.call


def test_what_was_measured_is_chosen_now_and_by_later_programs(monkeypatch, cache_folder):
    model, x = network(), torch.randn(2, 3, 9, 7)
    pretend(monkeypatch, torch=3.0, channels_last=1.0, direct=2.0)
    omniconv.tune(model, x)
    y, conv = model[0](x), model[1]

    def chosen(y):
        return explain(depthwise_conv, y, conv.weight, conv.bias, padding=1).chosen

    assert chosen(y) == "channels_last"
    assert chosen(y[:1]) != "channels_last"  # another size
    with torch.no_grad():
        assert chosen(y) != "channels_last"  # without gradients
    choices.known_choices.cache_clear()  # as another program finds it
    assert chosen(y) == "channels_last"
    assert [file.name for file in cache_folder.rglob("*") if file.is_file()] == ["choices.json"]
    choices.forget_choices()
    assert chosen(y) != "channels_last"


def test_plain_torch_gives_way_only_to_more_than_noise(monkeypatch):
    pretend(monkeypatch, torch=1.0, direct=0.99)
    assert omniconv.tune(network(), torch.randn(2, 3, 9, 7)).timings[0].chosen == "torch"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"other machine": {}}', "null"])
def test_a_file_that_cannot_be_read_is_no_obstacle(text, monkeypatch):
    file = choices.choices_file()
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert choices.known_choices() == {}
    pretend(monkeypatch, torch=2.0, direct=1.0)
    omniconv.tune(network(), torch.randn(2, 3, 9, 7))
    (mine,) = [value for value in json.loads(file.read_text()).values() if value]
    assert list(mine["depthwise_conv"].values()) == ["direct"]


def test_a_network_without_operators_is_told():
    assert str(omniconv.tune(nn.Linear(3, 2), torch.randn(1, 3))) == "no operator of omniconv was called"


def test_calls_that_a_stored_choice_cannot_take_are_chosen_for(monkeypatch):
    model, x = network(), torch.randn(2, 3, 9, 7)
    pretend(monkeypatch, torch=2.0, gone=1.0)
    omniconv.tune(model, x)
    assert model(x).shape == (2, 8, 9, 7)
