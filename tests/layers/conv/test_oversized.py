"""Oversized convolution against matrices, and its kernels when the map changes."""

import torch
from scipy.linalg import toeplitz

from omniconv.layers.conv.oversized import OversizedConv2d


def test_columns_and_rows_are_multiplied_by_full_toeplitz_matrices():
    torch.manual_seed(0)
    layer = OversizedConv2d(2, 13).double()
    x = torch.randn(3, 2, 7, 7, dtype=torch.float64)
    for channel in range(2):
        column = layer.conv_h.weight[channel].flatten().detach().numpy()
        row = layer.conv_w.weight[channel].flatten().detach().numpy()
        a = torch.from_numpy(toeplitz(column[6::-1], column[6:]))
        b = torch.from_numpy(toeplitz(row[6::-1], row[6:]))
        assert a.count_nonzero() == b.count_nonzero() == 49
        torch.testing.assert_close(layer(x)[:, channel], a @ x[:, channel] @ b.T)


def test_kernels_stretch_with_the_map_and_keep_their_ends():
    torch.manual_seed(0)
    plain, stretched = OversizedConv2d(2, 13), OversizedConv2d(2, 13, resize=True)
    stretched.load_state_dict(plain.state_dict())
    x = torch.randn(1, 2, 7, 7)
    torch.testing.assert_close(stretched(x), plain(x))
    # From the first pixel of a longer column, the last one is reached by the kernel's end.
    torch.nn.init.zeros_(stretched.conv_w.weight)
    stretched.conv_w.weight.data[..., 6] = 1
    x = torch.zeros(1, 2, 12, 7)
    x[:, :, -1] = 1
    torch.testing.assert_close(
        stretched(x)[0, :, 0], stretched.conv_h.weight[:, 0, -1].expand(2, 7).contiguous()
    )
