import pytest
import torch
from torch import nn

from omniconv.compress.factor.apriori import (
    factorize,
    fit_one_way,
    one_way_conv,
    one_way_parameters,
    one_way_rank,
)
from omniconv.models.factory import create_model

CONVOLUTIONS = {
    "plain": (nn.Conv2d(4, 6, (3, 5), padding=(1, 2)), 3),
    "strided": (nn.Conv2d(4, 6, 3, stride=(2, 1), padding=2, dilation=(1, 2), bias=False), 2),
    "same": (nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect"), 2),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), 4),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), 4),
    "transposed": (nn.ConvTranspose2d(4, 6, (4, 3), stride=2, padding=1, output_padding=(1, 0)), 3),
    "transposed groups": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), 4),
    "1d": (nn.Conv1d(4, 6, 7, stride=3), 5),
    "3d": (nn.Conv3d(4, 6, (3, 1, 2), padding=(1, 0, 1)), 2),
}


def dense(chain: nn.Sequential, conv: nn.Module) -> torch.Tensor:
    """The kernel as the sum of outer products, laid out as that of `conv`."""
    first, *spatial, last = chain
    groups, rank = conv.groups, first.out_channels // conv.groups
    c = first.weight.reshape(groups, rank, -1)
    m = last.weight.reshape(groups, -1, rank)
    kernel = torch.einsum("gri,gor->goir", c, m)
    filters = iter(spatial)
    for size in conv.kernel_size:
        part = next(filters).weight.reshape(groups, 1, 1, rank, -1) if size > 1 else c.new_ones(1, 1, 1, 1, 1)
        before = kernel.shape[4:]
        kernel = kernel[..., None] * part.reshape(*part.shape[:4], *(1,) * len(before), -1)
    kernel = kernel.sum(3)
    if isinstance(conv, nn.ConvTranspose2d):
        kernel = kernel.transpose(1, 2)
    return kernel.reshape(conv.weight.shape)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_chain_is_the_convolution_with_the_sum_of_outer_products(name):
    torch.manual_seed(0)
    conv, rank = CONVOLUTIONS[name]
    chain = one_way_conv(conv, rank)
    assert sum(m.weight.numel() for m in chain) == one_way_parameters(conv, rank)
    x = torch.randn(2, 4, *(9, 8, 7)[: len(conv.kernel_size)])
    wanted = torch.func.functional_call(conv, {"weight": dense(chain, conv)}, x)
    assert torch.allclose(chain(x), wanted, atol=1e-5)
    # It starts as loud as the layer was.
    assert 0.3 < dense(chain, conv).norm() / conv.weight.norm() < 3


def test_the_best_rank_of_a_saving():
    conv = nn.Conv2d(32, 64, 3)
    assert one_way_rank(conv, 4.0) == 32 * 64 * 9 // 4 // (32 + 3 + 3 + 64)
    assert one_way_rank(nn.Conv2d(8, 8, 3, groups=4), 1000.0) == 4


def test_sums_of_outer_products_are_found():
    torch.manual_seed(0)
    parts = [torch.randn(2, size, dtype=torch.float64) for size in (5, 4, 3, 3)]
    tensor = torch.einsum("ra,rb,rc,rd->abcd", *parts)
    found = torch.einsum("ra,rb,rc,rd->abcd", *fit_one_way(tensor, 2))
    assert (found - tensor).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["plain", "groups", "transposed groups"])
def test_a_fitted_chain_of_full_rank_is_the_layer(name):
    torch.manual_seed(0)
    conv = CONVOLUTIONS[name][0]
    x = torch.randn(1, 4, 6, 7)
    chain = one_way_conv(conv, 45 * conv.groups, fit=True)
    assert (chain(x) - conv(x)).abs().max() < 1e-3


def test_a_residual_network_is_converted_and_trains():
    torch.manual_seed(0)
    model = create_model("resnet_test", num_classes=5)
    small, report = factorize(model, 3.0, input_shape=(3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    assert small(x).shape == (2, 5)
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert report.after.parameters < report.before.parameters / 2
    assert report.after.macs < report.before.macs
    assert len(report.notes) == sum(isinstance(m, nn.Sequential) and len(m) == 4 for m in small.modules())
    one, report = factorize(model, rank=3, layers=["layer1.0.conv1"])
    assert report.notes == (f"layer1.0.conv1: rank 3, {3 * (2 * 8 + 6)} of {8 * 8 * 9} weights.",)
    assert isinstance(one.get_submodule("layer1.0.conv2"), nn.Conv2d)


def test_what_cannot_be_factorized():
    with pytest.raises(ValueError, match="rank must be a positive multiple of groups 2: got 3"):
        one_way_conv(nn.Conv2d(4, 4, 3, groups=2), 3)
    with pytest.raises(ValueError, match=r"conv must be a convolution of torch\.nn: got Linear"):
        one_way_conv(nn.Linear(4, 4), 3)
    with pytest.raises(ValueError, match="layers: 'stem' is no convolution in space"):
        factorize(nn.Sequential(nn.Conv2d(3, 4, 3)), layers=["stem"])
