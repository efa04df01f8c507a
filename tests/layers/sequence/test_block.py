"""The gated block against its equation, and its causality."""

from functools import partial

import torch
from torch import nn

from omniconv.layers.sequence.block import GatedBlock


def test_it_computes_its_equation():
    torch.manual_seed(0)
    block = GatedBlock(partial(nn.Conv1d, 4, 4, 3, padding=1), 4).double()
    nn.init.normal_(block.norm.weight)
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    weight, bias = block.mix.parameters()
    f = block.inner(x)
    hidden = 0.5 * f * (1 + torch.erf(f / 2**0.5))
    both = torch.einsum("oc,ncl->nol", weight[:, :, 0], hidden) + bias[:, None]
    y = x + both[:, :4] / (1 + torch.exp(-both[:, 4:]))
    y = (y - y.mean(1, keepdim=True)) / torch.sqrt(y.var(1, keepdim=True, unbiased=False) + 1e-5)
    expected = y * block.norm.weight[:, None] + block.norm.bias[:, None]
    torch.testing.assert_close(block(x), expected)


def test_without_mixing_over_time_every_step_stands_alone():
    torch.manual_seed(0)
    block = GatedBlock(partial(nn.Conv1d, 4, 4, 1), 4)
    x = torch.randn(1, 4, 6)
    torch.testing.assert_close(block(x)[:, :, 2:3], block(x[:, :, 2:3]))


def test_dropout_is_for_training_and_takes_whole_channels():
    torch.manual_seed(0)
    block = GatedBlock(partial(nn.Conv1d, 64, 64, 1), 64, dropout=0.5)
    x = torch.randn(1, 64, 8)
    assert not torch.equal(block.train()(x), block.eval()(x))
    dropped = (block.train().dropout(torch.ones(1, 64, 8)) == 0).float().mean(2)
    assert set(dropped.unique().tolist()) == {0.0, 1.0}
