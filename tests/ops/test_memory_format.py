import pytest
import torch
from torch.nn import functional as F

from omniconv.ops import depthwise_conv
from omniconv.ops.memory_format import memory_format

LAST = torch.channels_last


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (2, 6, 1, 7), (2, 6, 5, 1), (1, 6, 5, 7)])
def test_some_channels_of_a_map_have_its_format(shape):
    x = torch.randn(shape)
    for form in (torch.contiguous_format, LAST):
        for part in (x.contiguous(memory_format=form), x.contiguous(memory_format=form)[:, 1:4]):
            # torch's convolution answers in the format that it sees.
            seen = F.conv2d(part, torch.randn(4, part.shape[1], 1, 1))
            assert (memory_format(part) == LAST) == seen.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("impl", ["torch", "channels_last", "direct", "fft"])
def test_branches_answer_in_the_format_of_their_slice(impl):
    x = torch.randn(2, 12, 9, 11).contiguous(memory_format=LAST)[:, 4:8]
    y = depthwise_conv(x, torch.randn(4, 1, 3, 3), padding=1, impl=impl)
    assert y.is_contiguous(memory_format=LAST)


def test_several_kernels_a_channel_keep_the_format_of_gradients():
    x = torch.randn(2, 4, 9, 11).contiguous(memory_format=LAST).requires_grad_()
    y = depthwise_conv(x, torch.randn(12, 1, 3, 3), padding=1, impl="direct")
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.is_contiguous(memory_format=LAST)
    assert gradient.is_contiguous(memory_format=LAST)
