"""Kolmogorov-Arnold convolutions: every tap of a kernel is a function of its pixel instead of a factor.

Paper: Drokin, Kolmogorov-Arnold Convolutions, https://arxiv.org/abs/2407.01092. A function is a weighted sum of a basis
(`omniconv.layers.conv.ka_bases`), so the layer is one convolution over the pixels' values under all of them. The norm
and activation that the authors' code has inside the layer are left to the network around it.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case
from omniconv.layers.conv.ka_bases import Basis, BSplines, Gaussians, Polynomials, Wavelets

__all__ = ["BottleneckKAConv2d", "KAConv1d", "KAConv2d", "KAConv3d", "train_degrees"]

Activation = Callable[[Tensor], Tensor]
GRAM = Polynomials("gram")
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _KAConv(nn.Module):
    """`KAConv2d` in any number of dimensions."""

    axes: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        basis: Basis = GRAM,
        act: Activation | None = F.silu,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.basis, self.act = basis, act
        self.options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        shape = (out_channels, in_channels, *(kernel_size,) * self.axes)
        self.base = None if act is None else nn.Parameter(torch.empty(shape, **factory))
        # One parameter a function, so that some can be trained and the others kept.
        self.weights = nn.ParameterList([torch.empty(shape, **factory) for _ in range(basis.size)])
        self.learned = nn.Parameter(torch.empty(len(basis.start), **factory)) if basis.start else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights: the base as torch draws a convolution, the functions so that all have its variance."""
        bound = self.weights[0][0].numel() ** -0.5
        if self.base is not None:
            self.base.uniform_(-bound, bound)
        for weight in self.weights:
            weight.uniform_(-bound * self.basis.size**-0.5, bound * self.basis.size**-0.5)
        if self.learned is not None:
            self.learned.copy_(torch.tensor(self.basis.start))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the functions of `x`."""
        maps = self.basis(x, x.new_empty(0) if self.learned is None else self.learned)
        kernels = list(self.weights)
        if self.act is not None and self.base is not None:
            maps, kernels = [self.act(x), *maps], [self.base, *kernels]
        return _CONVOLVE[self.axes](torch.cat(maps, 1), torch.cat(kernels, 1), **self.options)

    @torch.no_grad()
    def add_degrees(self, count: int = 1) -> None:
        """Add polynomials of the next degrees, with weights of zero, so that the output stays.

        Raises:
            ValueError: if the basis has no degrees, or all of its functions change with the highest.
        """
        if not isinstance(self.basis, Polynomials):
            raise ValueError(f"only polynomials of a recurrence have further degrees: got {self.basis}")
        self.basis = dataclasses.replace(self.basis, degree=self.basis.degree + count)
        self.weights.extend(torch.zeros_like(self.weights[0]) for _ in range(count))
        start = torch.tensor(self.basis.start, device=self.weights[0].device, dtype=self.weights[0].dtype)
        if len(start):
            old = start[:0] if self.learned is None else self.learned
            self.learned = nn.Parameter(torch.cat([old, start[len(old) :]]))


class KAConv1d(_KAConv):
    """`KAConv2d` for :math:`(N, C, L)`."""

    axes = 1


class KAConv2d(_KAConv):
    r"""Layer of `Kolmogorov-Arnold Convolutions <https://arxiv.org/abs/2407.01092>`_.

    .. math:: y_{o,i,j} = \sum_{c,u,v} \varphi_{o,c,u,v}(x_{c,\,i + u,\,j + v}), \qquad
              \varphi(x) = w\, a(x) + \sum_b w_b\, P_b(x)

    with the functions :math:`P_b` of a basis and an activation a. Where pixels are padded, all functions are zero.

    Args:
        in_channels, out_channels: of input and output.
        kernel_size: k; there are :math:`k^2 C_\mathrm{in} C_\mathrm{out}` functions.
        basis: one of those in `omniconv.layers.conv.ka_bases`, Gram polynomials of degree 3 by default. Each function
            has as many weights as it has members, and one for a.
        act: a, of which B-splines usually take `gelu`; None leaves it out.
        stride, padding, dilation: as in `torch.nn.Conv2d`, with one number for both axes.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, H', W')`
    """

    axes = 2


class KAConv3d(_KAConv):
    """`KAConv2d` for :math:`(N, C, D, H, W)`."""

    axes = 3


class BottleneckKAConv2d(nn.Module):
    r"""Kolmogorov-Arnold convolution between two 1x1 convolutions, beside an ordinary one.

    .. math:: y = W * a(x) + E\, \Phi(S x)

    with a squeeze S to :math:`\max(16, C_\mathrm{in} / r)` channels, the functions :math:`\Phi` without activation, and
    an expansion E.

    Args:
        in_channels, out_channels, kernel_size: as in `KAConv2d`.
        basis: of the functions.
        ratio: r.
        act: a.
        stride, padding, dilation: as in `KAConv2d`.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, H', W')`
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        basis: Basis = GRAM,
        ratio: int = 4,
        act: Activation = F.silu,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, **factory}
        width = max(16, in_channels // ratio)
        self.act = act
        self.base = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, **options)
        self.squeeze = nn.Conv2d(in_channels, width, 1, bias=False, **factory)
        self.functions = KAConv2d(width, width, kernel_size, basis=basis, act=None, **options)
        self.expand = nn.Conv2d(width, out_channels, 1, bias=False, **factory)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for layer in (self.base, self.squeeze, self.functions, self.expand):
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both branches."""
        return self.base(self.act(x)) + self.expand(self.functions(self.squeeze(x)))


def train_degrees(model: nn.Module, degrees: Collection[int]) -> None:
    """Let only the functions at some places of their basis be trained, in every Kolmogorov-Arnold layer of a model.

    Everything else of these layers is frozen; other layers stay as they are.

    Args:
        model: any module.
        degrees: places in the basis, which for polynomials are degrees.
    """
    for layer in model.modules():
        if isinstance(layer, _KAConv):
            layer.requires_grad_(False)
            for degree in degrees:
                layer.weights[degree].requires_grad_(True)


CASES = (
    Case(
        KAConv1d,
        {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "basis": BSplines(), "act": F.gelu, "padding": 1},
        inputs=((2, 3, 11),),
        output=(2, 4, 11),
        vary=(0, 2),
    ),
    Case(
        KAConv2d,
        {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": 1},
        inputs=((2, 3, 7, 5),),
        output=(2, 4, 7, 5),
        id="gram",
        minimal=(1, 3, 1, 1),
    ),
    Case(
        KAConv2d,
        {
            "in_channels": 3, "out_channels": 4, "kernel_size": 3, "basis": Wavelets(3), "act": None,
            "stride": 2, "padding": 2, "dilation": 2,
        },
        inputs=((2, 3, 9, 7),),
        output=(2, 4, 5, 4),
        id="wavelets",
    ),
    Case(
        KAConv3d,
        {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "basis": Gaussians(3), "padding": 1},
        inputs=((2, 3, 5, 7, 6),),
        output=(2, 4, 5, 7, 6),
        vary=(0, 2, 3, 4),
    ),
    Case(
        BottleneckKAConv2d,
        {"in_channels": 5, "out_channels": 4, "kernel_size": 3, "basis": Polynomials("legendre", 2), "padding": 1},
        inputs=((2, 5, 7, 6),),
        output=(2, 4, 7, 6),
    ),
)  # fmt: skip
