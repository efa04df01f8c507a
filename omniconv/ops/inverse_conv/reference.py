"""The inverse of a corner convolution as a dense system of equations."""

import torch
from torch import Tensor

__all__ = ["corner_matrix", "reference"]


def corner_matrix(weight: Tensor, height: int, width: int) -> Tensor:
    """Return the matrix (C H W, C H W) of the corner convolution, pixel after pixel, of each the channels.

    It is lower triangular with a unit diagonal.
    """
    channels, _, kh, kw = weight.shape
    matrix = weight.new_zeros(height, width, channels, height, width, channels)
    for a in range(kh):
        for b in range(kw):
            down, right = kh - 1 - a, kw - 1 - b
            tap = weight[:, :, a, b]
            if down == right == 0:
                tap = tap.tril(-1) + torch.eye(channels, dtype=weight.dtype, device=weight.device)
            for i in range(down, height):
                for j in range(right, width):
                    matrix[i, j, :, i - down, j - right] = tap
    return matrix.reshape(height * width * channels, -1)


def reference(y: Tensor, weight: Tensor) -> Tensor:
    """Return x, for which the corner convolution with the weight gives y."""
    n, channels, height, width = y.shape
    flat = y.permute(0, 2, 3, 1).reshape(n, -1)
    x = torch.linalg.solve(corner_matrix(weight, height, width), flat.T).T
    return x.reshape(n, height, width, channels).permute(0, 3, 1, 2)
