"""The convolution as the full tensor product with a filter of spherical harmonics, path by path."""

import torch
from torch import Tensor

from omniconv.ops.clebsch_gordan import clebsch_gordan
from omniconv.ops.so2_conv.weights import pad_orders, to_paths, weight_rows
from omniconv.ops.spherical_harmonics import spherical_harmonics

__all__ = ["reference", "tensor_product"]


def tensor_product(x: Tensor, directions: Tensor, paths: Tensor, degree: int) -> Tensor:
    r"""Return the convolution with path weights h.

    .. math:: y^k_c = \sum_{l, f} h_{k l f} \sum_{ab} C^{l f k}_{abc}\, x^l_a\, Y^f_b(n)

    Args:
        x: (E, (L + 1)^2, C).
        directions: unit vectors (E, 3).
        paths: (T, C', C), for every k and l one for each f from abs(l - k) to l + k.
        degree: L.
    """
    filters = spherical_harmonics(directions, 2 * degree)
    outputs = []
    for k in range(degree + 1):
        y = x.new_zeros(x.shape[0], 2 * k + 1, paths.shape[1])
        for n in range(degree + 1):
            at, most = weight_rows(degree, degree)[k, n]
            for f in range(abs(k - n), k + n + 1):
                coupling = torch.from_numpy(clebsch_gordan(n, f, k)).to(x)
                product = torch.einsum(
                    "abc,eai,eb->eci", coupling, x[:, n * n : (n + 1) ** 2], filters[:, f * f : (f + 1) ** 2]
                )
                y = y + product @ paths[at - most + f - abs(k - n)].T
        outputs.append(y)
    return torch.cat(outputs, 1)


def reference(x: Tensor, directions: Tensor, weight: Tensor, degree: int, order: int) -> Tensor:
    """Return the convolution of a prepared call as a tensor product, with the weights that do the same there."""
    unit = directions / directions.norm(dim=-1, keepdim=True)
    return tensor_product(x, unit, to_paths(pad_orders(weight, degree, order), degree), degree)
