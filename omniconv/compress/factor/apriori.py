"""A priori compression: before training, convolutions become chains of one-way filters.

Paper: Boukraichi et al., A priori compression of convolutional neural networks for wave simulators,
https://arxiv.org/abs/2304.04964. One filter runs over channels and one over each axis of space; the chain is a
canonical polyadic form of the kernel. Beside the paper, the factors can be fitted to the kernels of a trained model.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from omniconv.compress.report import CompressionReport, compare
from omniconv.core.config import closest
from omniconv.core.seeds import generator

__all__ = ["factorize", "fit_one_way", "one_way_conv", "one_way_parameters", "one_way_rank"]

M = TypeVar("M", bound=nn.Module)

_SETTINGS = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}


def one_way_parameters(conv: nn.Module, rank: int) -> int:
    r"""Return the weights of a chain of `rank` intermediate maps.

    .. math:: R \Bigl(\frac{C_\mathrm{in}}{g} + \sum_a k_a + \frac{C_\mathrm{out}}{g}\Bigr)

    Axes along which the kernel does nothing, k = 1 without stride and padding, are left out of the sum.
    """
    conv = _checked(conv)
    sizes = [conv.kernel_size[axis] for axis in _axes(conv)]
    return rank * (conv.in_channels // conv.groups + sum(sizes) + conv.out_channels // conv.groups)


def one_way_rank(conv: nn.Module, saving: float) -> int:
    """Return the largest rank with which a chain has `saving` times fewer weights; at least one for each group."""
    conv = _checked(conv)
    rank = int(conv.weight.numel() / saving) // one_way_parameters(conv, 1)
    return max(rank // conv.groups, 1) * conv.groups


def _checked(conv: nn.Module) -> _ConvNd:
    if not isinstance(conv, _ConvNd):
        raise ValueError(f"conv must be a convolution of torch.nn: got {type(conv).__name__}")
    return conv


def _along(conv: _ConvNd, name: str, axis: int | None) -> Any:
    """Return a setting of the convolution along one axis; without an axis, what changes nothing."""
    value = getattr(conv, name)
    # "same" and "valid" mean nothing along kernels of size 1.
    if axis is None or isinstance(value, str):
        return value if isinstance(value, str) else _SETTINGS[name]
    return value[axis]


def _axes(conv: _ConvNd) -> list[int]:
    """Return the axes along which the convolution does anything."""
    return [
        axis
        for axis in range(len(conv.kernel_size))
        if any(_along(conv, name, axis) != _along(conv, name, None) for name in _SETTINGS)
    ]


def one_way_conv(conv: nn.Module, rank: int, *, fit: bool = False) -> nn.Sequential:
    r"""Return the chain of one-way filters that stands for a convolution (`Boukraichi et al. <https://arxiv.org/abs/2304.04964>`_).

    .. math:: K_{oihw} = \sum_{r=1}^{R} m_{or}\, c_{ri}\, v_{rh}\, w_{rw}

    is applied as a 1x1 convolution c to R maps, a kx1 and a 1xk convolution of every map by itself, and a 1x1
    convolution m with the bias. All are plain convolutions of torch.nn; stride, padding, dilation and groups are those
    of `conv`, and so are the places that outputs see.

    Args:
        conv: a convolution of torch.nn, transposed or not, of one to three axes.
        rank: R, a multiple of the groups.
        fit: start from the kernel that comes closest to that of `conv`, instead of a random one of its norm.

    Raises:
        ValueError: if `rank` is not a positive multiple of the groups.
    """
    conv = _checked(conv)
    if rank < 1 or rank % conv.groups:
        raise ValueError(f"rank must be a positive multiple of groups {conv.groups}: got {rank}")
    kind: Any = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d)}.get(
        len(conv.kernel_size), (nn.Conv3d, nn.ConvTranspose3d)
    )
    place = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    chain: list[_ConvNd] = [kind[0](conv.in_channels, rank, 1, groups=conv.groups, bias=False, **place)]
    transposed = isinstance(conv, _ConvTransposeNd)
    for axis in _axes(conv):
        setting: dict[str, Any] = {}
        for name in _SETTINGS:
            spread = [_along(conv, name, a if a == axis else None) for a in range(len(conv.kernel_size))]
            setting[name] = spread[0] if isinstance(spread[0], str) else tuple(spread)
        if not transposed:
            setting |= {"padding_mode": conv.padding_mode}
            del setting["output_padding"]
        chain.append(kind[transposed](rank, rank, groups=rank, bias=False, **setting, **place))
    chain.append(kind[0](rank, conv.out_channels, 1, groups=conv.groups, bias=conv.bias is not None, **place))
    _start(chain, conv, fit)
    return nn.Sequential(*chain).train(conv.training)


@torch.no_grad()
def _start(chain: list[_ConvNd], conv: _ConvNd, fit: bool) -> None:
    """Set the filters: those over channels and space have norm 1, so that maps stay as loud as they are."""
    first, *spatial, last = chain
    rank, axes = len(first.weight), _axes(conv)
    if fit:
        parts = [fit_one_way(block, rank // conv.groups) for block in _blocks(conv)]
        mix, channel, *filters = (torch.cat(factors, 0) for factors in zip(*parts, strict=True))
    else:
        device, dtype = conv.weight.device, conv.weight.dtype
        sizes = [conv.in_channels // conv.groups, *(conv.kernel_size[axis] for axis in axes)]
        drawn = [torch.randn(rank, size, device=device, dtype=dtype) for size in sizes]
        channel, *filters = (F.normalize(part, dim=1) for part in drawn)
        mix = torch.randn(rank, conv.out_channels // conv.groups, device=device, dtype=dtype)
        mix *= conv.weight.norm() / math.sqrt(mix.numel())
    first.weight.copy_(channel.reshape(first.weight.shape))
    for module, part in zip(spatial, filters, strict=True):
        module.weight.copy_(part.reshape(module.weight.shape))
    # Of every group the outputs come first.
    mix = mix.unflatten(0, (conv.groups, -1)).mT
    last.weight.copy_(mix.reshape(last.weight.shape))
    if conv.bias is not None and last.bias is not None:
        last.bias.copy_(conv.bias)


def _blocks(conv: _ConvNd) -> Tensor:
    """Return the kernels of every group (g, C_out / g, C_in / g, *K), without the axes that do nothing."""
    if isinstance(conv, _ConvTransposeNd):
        blocks = conv.weight.unflatten(0, (conv.groups, -1)).transpose(1, 2)
    else:
        blocks = conv.weight.unflatten(0, (conv.groups, -1))
    return blocks.reshape(*blocks.shape[:3], *(conv.kernel_size[axis] for axis in _axes(conv)))


@torch.no_grad()
def fit_one_way(weight: Tensor, rank: int, *, iterations: int = 200, seed: int = 0) -> list[Tensor]:
    r"""Return the factors of `rank` outer products whose sum is close to a tensor, by alternating least squares.

    Args:
        weight: (S_1, S_2, ...).
        rank: R.
        iterations: over all factors.
        seed: of the factors at first.

    Returns:
        (R, S_1), (R, S_2), ...: of norm 1 but for the first ones.
    """
    random = generator(seed, "factors")
    factors = [torch.randn(rank, size, generator=random, dtype=torch.float64) for size in weight.shape]
    target, letters = weight.detach().double().cpu(), "abcdefgh"[: weight.ndim]
    for _, axis in itertools.product(range(iterations), reversed(range(weight.ndim))):
        others = [a for a in range(weight.ndim) if a != axis]
        gram = torch.stack([factors[a] @ factors[a].T for a in others]).prod(0)
        terms = ",".join(f"r{letters[a]}" for a in others)
        wanted = torch.einsum(f"{letters},{terms}->r{letters[axis]}", target, *(factors[a] for a in others))
        factor = torch.linalg.pinv(gram, hermitian=True) @ wanted
        factors[axis] = F.normalize(factor, dim=1) if axis else factor
    return [factor.to(weight) for factor in factors]


def factorize(
    model: M,
    saving: float = 4.0,
    *,
    rank: int | None = None,
    fit: bool = False,
    layers: Sequence[str] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CompressionReport]:
    """Replace convolutions by chains of one-way filters, to be trained then (`Boukraichi et al. <https://arxiv.org/abs/2304.04964>`_).

    Args:
        model: any module; it stays as it is.
        saving: how many times fewer weights each layer has, see `one_way_rank`.
        rank: the same rank for every layer instead, rounded up to a multiple of its groups.
        fit: start from kernels close to those of a trained model, which needs a short training still.
        layers: names of the convolutions to replace; by default all whose chain has fewer weights.
        input_shape: of one sample; the report counts multiply-adds if it is given.

    Returns:
        The copy, of plain convolutions, and the report, whose notes give every layer's rank and weights.

    Raises:
        ValueError: if `layers` names none.
    """
    result = copy.deepcopy(model)
    found = {
        name: m
        for name, m in result.named_modules()
        if isinstance(m, _ConvNd) and math.prod(m.kernel_size) > 1
    }
    for name in layers or ():
        if name not in found:
            raise ValueError(f"layers: {name!r} is no convolution in space{closest(name, list(found))}")
    notes = []
    for name, conv in found.items():
        if layers is not None and name not in layers:
            continue
        maps = one_way_rank(conv, saving) if rank is None else math.ceil(rank / conv.groups) * conv.groups
        weights = one_way_parameters(conv, maps)
        if layers is None and weights >= conv.weight.numel():
            continue
        notes.append(f"{name}: rank {maps}, {weights:,} of {conv.weight.numel():,} weights.")
        chain = one_way_conv(conv, maps, fit=fit)
        if not name:
            result: Any = chain
        else:
            result.set_submodule(name, chain)
    report = compare(
        "a priori one-way convolutions", model, result, input_shape=input_shape, notes=tuple(notes)
    )
    return result, report
