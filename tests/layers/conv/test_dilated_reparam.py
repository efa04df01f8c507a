import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.conv.dilated_reparam import DILATED_BRANCHES, DilatedReparamBlock, insert_zeros
from omniconv.layers.conv.reparam import Mergeable, reparameterize


def _randomise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            for tensor in (module.running_mean, module.weight, module.bias):
                nn.init.normal_(tensor)


@pytest.mark.parametrize("kernel_size", DILATED_BRANCHES)
def test_merged_convolution_equals_the_branches(kernel_size):
    block = DilatedReparamBlock(3, kernel_size).double()
    _randomise(block)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    block.eval()
    merged = block.merged()
    assert isinstance(merged, nn.Conv2d)
    assert merged.kernel_size == (kernel_size, kernel_size)
    x = torch.randn(2, 3, 19, 14, dtype=torch.float64)
    torch.testing.assert_close(merged(x), block(x), rtol=1e-10, atol=1e-10)
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(("size", "dilation"), sorted(set(sum(DILATED_BRANCHES.values(), ()))))
def test_dilation_is_a_kernel_with_zeros(size, dilation):
    kernel = torch.randn(4, 1, size, size)
    dense = insert_zeros(kernel, dilation)
    x = torch.randn(1, 4, 21, 17)
    margin = (size - 1) * dilation // 2
    dilated = F.conv2d(x, kernel, padding=margin, dilation=dilation, groups=4)
    torch.testing.assert_close(F.conv2d(x, dense, padding=margin, groups=4), dilated, rtol=0, atol=1e-5)


def test_every_branch_fits_into_its_large_kernel():
    for large, branches in DILATED_BRANCHES.items():
        assert all((size - 1) * dilation + 1 <= large for size, dilation in branches)


def test_names_are_those_of_the_public_weights():
    names = {name.rpartition(".")[0] for name in DilatedReparamBlock(2, 7).state_dict()}
    branches = {f"dil_{part}_{branch}" for part in ("conv", "bn") for branch in ("k5_1", "k3_2", "k3_3")}
    assert names == {"lk_origin", "origin_bn"} | branches


def test_reparameterize_replaces_it_inside_a_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), DilatedReparamBlock(4, 5), nn.ReLU())
    assert isinstance(model[1], Mergeable)
    _randomise(model)
    merged = reparameterize(model)
    assert isinstance(merged[1], nn.Conv2d)
    x = torch.randn(1, 3, 8, 9)
    torch.testing.assert_close(merged(x), model.eval()(x), rtol=1e-4, atol=1e-4)
