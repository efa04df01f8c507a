r"""Which input row lies under which tap of which output row: the kernel map that sparse convolution runs along.

Output site :math:`o` sees input site :math:`p = s\,o + d\,u - \text{padding}` through tap u. Sites are found by a
binary search among their linear indices; the box that these count is wider than the map by what kernels overhang,
so that no query beyond the border can be mistaken for a site in the next row.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["kernel_map", "output_shape", "output_sites", "taps", "unique_sites"]


def output_shape(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Return the sizes of the map that a convolution gives, as torch counts them.

    Raises:
        ValueError: if an axis of the output would be empty.
    """
    sizes = tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(shape, kernel_size, stride, padding, dilation, strict=True)
    )
    if min(sizes) < 1:
        raise ValueError(f"the kernel {tuple(kernel_size)} does not fit into maps of {tuple(shape)}")
    return sizes


def output_sites(
    coordinates: Tensor,
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the sites (Q, 1 + d) that see at least one active input site, in lexicographic order.

    Args:
        coordinates: active sites of the input, (P, 1 + d).
        shape: sizes of the input map.
        kernel_size: taps along every axis.
        stride: s of every axis.
        padding: of every axis.
        dilation: d of every axis.
    """
    sizes = output_shape(shape, kernel_size, stride, padding, dilation)
    scaled = coordinates[:, None, 1:] + _row(padding, coordinates) - taps(kernel_size, dilation, coordinates)
    sites = scaled.div(_row(stride, coordinates), rounding_mode="floor")
    seen = (sites * _row(stride, coordinates) == scaled) & (sites >= 0) & (sites < _row(sizes, coordinates))
    batch = coordinates[:, None, :1].expand(-1, sites.shape[1], 1)
    sites = torch.cat([batch, sites], -1)[seen.all(-1)]
    return unique_sites(sites, sizes)[0]


def unique_sites(sites: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the different ones among sites (V, 1 + d) in lexicographic order, and which of them each site is (V,).

    Args:
        sites: samples and positions inside maps of sizes `shape`.
        shape: the d sizes.
    """
    places = _places(shape)
    keys, which = (sites * _row(places, sites)).sum(-1).unique(return_inverse=True)
    columns = []
    for place in places:
        columns.append(keys.div(place, rounding_mode="floor"))
        keys = keys - columns[-1] * place
    return torch.stack(columns, -1), which


def kernel_map(
    inputs: Tensor,
    outputs: Tensor,
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the kernel map (Q, K): the row of `inputs` under every tap of every output site, -1 where none is active.

    Taps count as in a flattened kernel, the last axis fastest.

    Args:
        inputs: active input sites (P, 1 + d), each once.
        outputs: output sites (Q, 1 + d).
        shape: sizes of the input map.
        kernel_size: taps along every axis.
        stride: s of every axis.
        padding: of every axis.
        dilation: d of every axis.
    """
    reach = output_shape(shape, kernel_size, stride, padding, dilation)
    box = [
        max(size + p, s * (o - 1) + d * (k - 1) + 1)
        for size, o, k, s, p, d in zip(shape, reach, kernel_size, stride, padding, dilation, strict=True)
    ]
    places = _row(_places(box), inputs)
    keys, order = (inputs * places).sum(-1).sort()
    keys = keys + (_row(padding, inputs) * places[1:]).sum()
    first = (outputs * places * _row((1, *stride), inputs)).sum(-1)
    queries = first[:, None] + (taps(kernel_size, dilation, inputs) * places[1:]).sum(-1)
    # A last key that no query equals keeps every found position in range.
    keys = torch.cat([keys, keys.new_full((1,), torch.iinfo(torch.int64).max)])
    order = torch.cat([order, order.new_full((1,), -1)])
    found = torch.searchsorted(keys, queries)
    return torch.where(keys[found] == queries, order[found], -1)


def _places(sizes: Sequence[int]) -> list[int]:
    """Return what a step along the batch and every axis adds to the linear index."""
    return [math.prod(sizes[axis:]) for axis in range(len(sizes) + 1)]


def _row(numbers: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64, device=like.device)


def taps(kernel_size: Sequence[int], dilation: Sequence[int], like: Tensor) -> Tensor:
    """Return the positions (K, d) of a kernel's taps relative to the first, int64, on the device of `like`."""
    ranges = [range(0, k * d, d) for k, d in zip(kernel_size, dilation, strict=True)]
    return torch.tensor(list(itertools.product(*ranges)), dtype=torch.int64, device=like.device)
