"""What `auto` keeps of its choices is what it would choose anew."""

import itertools

import torch

from omniconv.ops.depthwise_conv.api import TABLE


def test_kept_choices_depend_on_everything_that_estimates_do():
    formats = (torch.contiguous_format, torch.channels_last)
    variants = list(
        itertools.product(formats, (torch.float32, torch.bfloat16), (31, 7, 3), (True, False), (1, 2))
    )
    chosen = set()
    for _ in range(2):  # estimated, then looked up
        for form, dtype, kernel, grad, stride in variants:
            x = torch.empty(4, 64, 56, 56, dtype=dtype).contiguous(memory_format=form)
            w = torch.empty(64, 1, kernel, kernel, dtype=dtype, requires_grad=grad)
            call = TABLE.prepare(x, w, stride=stride, padding=kernel // 2)
            taken = TABLE.select("auto", call)
            assert taken is TABLE._cheapest(call)
            chosen.add(taken.name)
    assert {"torch", "channels_last", "direct"} <= chosen


def test_kept_choices_are_bounded(monkeypatch):
    monkeypatch.setattr("omniconv.ops.dispatch._MOST_KEPT", 3)
    TABLE.kept.clear()
    for size in range(5, 15):
        TABLE.select("auto", TABLE.prepare(torch.empty(1, 2, size, size), torch.empty(2, 1, 3, 3)))
        assert 1 <= len(TABLE.kept) <= 3
