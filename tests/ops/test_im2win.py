"""The lowering by windows against loops over the map."""

import pytest
import torch

from omniconv.ops.im2win import im2win, windows


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), 1), ((2, 5), 2), ((4, 1), 3), ((5, 4), 1)])
def test_windows_are_those_of_the_map(form, kernel, stride):
    x = torch.randn(2, 3, 11, 9).contiguous(memory_format=form)
    lowered = im2win(x, kernel[0], stride=stride, padding=(1, 2))
    padded = torch.nn.functional.pad(x, (2, 2, 1, 1))
    found = windows(lowered, kernel, stride=stride)
    for i in range(found.shape[2]):
        for j in range(found.shape[3]):
            window = padded[:, :, i * stride : i * stride + kernel[0], j * stride : j * stride + kernel[1]]
            # Columns first.
            assert torch.equal(found[:, :, i, j], window.transpose(2, 3).flatten(2))
    assert found.untyped_storage().data_ptr() == lowered.untyped_storage().data_ptr()


def test_lowered_map_has_the_papers_size_and_keeps_the_format():
    x = torch.randn(2, 3, 11, 9)
    lowered = im2win(x, 5, stride=2)
    assert lowered.shape == (2, 3, 4, 5 * 9)
    assert lowered.untyped_storage().nbytes() == 4 * lowered.numel()
    assert lowered.is_contiguous()
    last = im2win(x.contiguous(memory_format=torch.channels_last), 5, stride=2)
    assert torch.equal(last, lowered)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_the_kernel_must_fit():
    with pytest.raises(ValueError, match="height must be at most the padded map's 4 rows: got 5"):
        im2win(torch.zeros(1, 1, 4, 9), 5)
