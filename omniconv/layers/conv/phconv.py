"""Parameterised hypercomplex layers: a kernel that is a sum of Kronecker products, with 1/n of the weights.

Paper: Grassucci, Zhang and Comminiello, PHNNs, https://arxiv.org/abs/2110.04176; the linear layer is that of Zhang
et al., https://arxiv.org/abs/2102.08597. Channels are n blocks, as the parts of a hypercomplex number are, and n small
matrices say how parts multiply. They are learned, or those of the complex numbers or the quaternions. Parameter names
are those of the authors' code, whose F has n and C_out / n as two axes.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from omniconv.core.cases import Case, Raises

__all__ = ["PHConv1d", "PHConv2d", "PHConv3d", "PHLinear", "hypercomplex", "multiplication_table"]

Algebra = Literal["complex", "quaternion"]
M = TypeVar("M", bound=nn.Module)

# Entry (p, q) is the unit that part q of the right factor needs from the left one to land in part p of the product,
# counted from 1, with the product's sign.
_PRODUCTS: dict[Algebra, tuple[tuple[int, ...], ...]] = {
    "complex": ((1, -2), (2, 1)),
    "quaternion": ((1, -2, -3, -4), (2, 1, -4, 3), (3, 4, 1, -2), (4, -3, 2, 1)),
}


def multiplication_table(algebra: Algebra) -> Tensor:
    r"""Return the matrices A (n, n, n) of an algebra, :math:`(f x)_p = \sum_{i,q} A_{ipq} f_i x_q`.

    Raises:
        ValueError: if the algebra is unknown.
    """
    if algebra not in _PRODUCTS:
        raise ValueError(f"algebra must be one of {list(_PRODUCTS)}: got {algebra!r}")
    units = torch.tensor(_PRODUCTS[algebra], dtype=torch.get_default_dtype())
    ranks = torch.arange(1, len(units) + 1)[:, None, None]
    return torch.where(units.abs() == ranks, units.sign(), 0.0)


class _Hypercomplex(nn.Module):
    """What all layers share: the algebra A (n, n, n), the n filters in F (out, in / n, taps...), and their kernel."""

    A: Tensor

    def __init__(
        self, in_features: int, out_features: int, taps: tuple[int, ...], n: int, bias: bool,
        algebra: Algebra | None, fixed: bool, device, dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, size in (("in", in_features), ("out", out_features)):
            if size % n:
                raise ValueError(f"n must divide the channels that go {name}: got {n} and {size}")
        if fixed and algebra is None:
            raise ValueError("a fixed algebra must be named: got algebra=None and fixed=True")
        if algebra is not None and n != (wanted := len(multiplication_table(algebra))):
            raise ValueError(f"the {algebra} algebra has n = {wanted}: got {n}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.n = n
        self.algebra: Algebra | None = algebra
        matrices = torch.empty(n, n, n, **factory)
        if fixed:
            self.register_buffer("A", matrices)
        else:
            self.A = nn.Parameter(matrices)
        self.F = nn.Parameter(torch.empty(out_features, in_features // n, *taps, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights, such that the kernel's have the variance that torch's own layers start with."""
        if self.algebra is None:
            bound = (3 / self.n) ** 0.5
            self.A.uniform_(-bound, bound)
        else:
            self.A.copy_(multiplication_table(self.algebra))
        # In a table of n units each entry has one term; drawn at random, it has n terms of variance 1 / n.
        bound = (self.n * self.F[0].numel()) ** -0.5
        self.F.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    def kernel(self) -> Tensor:
        """Return the ordinary kernel (out, in, taps...), the sum of Kronecker products of A and F."""
        filters = self.F.unflatten(0, (self.n, -1))
        blocks = torch.einsum("ipq,iab...->paqb...", self.A, filters)
        return blocks.flatten(2, 3).flatten(0, 1)


class PHLinear(_Hypercomplex):
    r"""Linear layer of `parameterised hypercomplex multiplication <https://arxiv.org/abs/2102.08597>`_.

    .. math:: y = \Bigl(\sum_{i=1}^n A_i \otimes F_i\Bigr) x + b

    Args:
        in_features, out_features: multiples of n.
        n: matrices :math:`A_i` of n x n; the weights are :math:`n^3` and 1/n of those of a linear layer.
        bias: add b.
        algebra: what A starts as, "complex" (n = 2) or "quaternion" (n = 4); random numbers if None.
        fixed: keep that algebra, and learn F alone.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(*, d_\mathrm{in})`
        - output: :math:`(*, d_\mathrm{out})`

    Raises:
        ValueError: if n does not divide both sizes, or is not that of the algebra.
    """

    def __init__(
        self, in_features: int, out_features: int, *, n: int = 4, bias: bool = True,
        algebra: Algebra | None = None, fixed: bool = False, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, (), n, bias, algebra, fixed, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with `x`."""
        return functional.linear(x, self.kernel(), self.bias)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the ordinary layer that computes the same."""
        return _with_weights(nn.Linear, self, self.kernel())


_CONVOLVE = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}


class _PHConv(_Hypercomplex):
    """`PHConv2d` in any number of dimensions."""

    plain: type[nn.Conv1d | nn.Conv2d | nn.Conv3d]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        n: int = 4,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
        algebra: Algebra | None = None,
        fixed: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        axes = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[self.plain]
        taps = (kernel_size,) * axes if isinstance(kernel_size, int) else tuple(kernel_size)
        super().__init__(in_channels, out_channels, taps, n, bias, algebra, fixed, device, dtype)
        self.options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`."""
        convolve = _CONVOLVE[self.plain]
        return convolve(x, self.kernel(), self.bias, **self.options)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the ordinary convolution that computes the same."""
        return _with_weights(self.plain, self, self.kernel(), self.F.shape[2:], **self.options)


class PHConv1d(_PHConv):
    """`PHConv2d` for :math:`(N, C, L)`."""

    plain = nn.Conv1d


class PHConv2d(_PHConv):
    r"""Convolution of `PHNNs <https://arxiv.org/abs/2110.04176>`_, with 1/n of the weights of an ordinary one.

    .. math:: y = W * x + b, \qquad W = \sum_{i=1}^n A_i \otimes F_i

    with n x n matrices :math:`A_i`, the algebra, and filters :math:`F_i` of
    :math:`C_\mathrm{out} / n \times C_\mathrm{in} / n \times k \times k`; the product is over channels.

    Args:
        in_channels, out_channels: multiples of n.
        kernel_size: k, one number or one for every axis.
        n: the weights are :math:`n^3 + k^2 C_\mathrm{in} C_\mathrm{out} / n`.
        stride, padding, dilation, bias: as in `torch.nn.Conv2d`.
        algebra: what A starts as, "complex" (n = 2) or "quaternion" (n = 4); random numbers if None.
        fixed: keep that algebra, and learn F alone.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, H', W')`

    Raises:
        ValueError: if n does not divide the channels, or is not that of the algebra.
    """

    plain = nn.Conv2d


class PHConv3d(_PHConv):
    """`PHConv2d` for :math:`(N, C, D, H, W)`."""

    plain = nn.Conv3d


def _with_weights(plain: Any, layer: _Hypercomplex, kernel: Tensor, *sizes: Any, **options: Any) -> Any:
    """Return a layer of torch with the kernel and the bias of `layer`."""
    out, channels = kernel.shape[:2]
    with torch.device("meta"):
        made = plain(channels, out, *sizes, bias=layer.bias is not None, **options)
    made.weight = nn.Parameter(kernel)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.clone())
    return made.train(layer.training)


_HYPERCOMPLEX = {nn.Conv1d: PHConv1d, nn.Conv2d: PHConv2d, nn.Conv3d: PHConv3d}


def hypercomplex(model: M, n: int, algebra: Algebra | None = None, *, fixed: bool = False) -> M:
    """Return a copy of any network whose convolutions are hypercomplex, with weights drawn anew.

    Convolutions in groups, and those with channels that n does not divide, stay as they are. Kernels start at the
    scale of those that they replace, so that a network's own initialisation holds. `reparameterize` makes ordinary
    convolutions of them after training.

    Args:
        model: the network; it is left as it is.
        n: the share of the weights that stay is 1/n.
        algebra: as in `PHConv2d`.
        fixed: as in `PHConv2d`.
    """
    model = copy.deepcopy(model)
    for name, conv in list(model.named_modules()):
        if type(conv) not in _HYPERCOMPLEX:
            continue
        assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ordinary = conv.groups == 1 and conv.padding_mode == "zeros"
        if name and ordinary and conv.in_channels % n == 0 and conv.out_channels % n == 0:
            layer = _HYPERCOMPLEX[type(conv)](
                conv.in_channels, conv.out_channels, conv.kernel_size, n=n, stride=conv.stride,
                padding=conv.padding, dilation=conv.dilation, bias=conv.bias is not None,
                algebra=algebra, fixed=fixed, device=conv.weight.device, dtype=conv.weight.dtype,
            )  # fmt: skip
            with torch.no_grad():
                layer.F.mul_(conv.weight.square().mean().sqrt() / layer.kernel().square().mean().sqrt())
            model.set_submodule(name, layer.train(conv.training))
    return model


CASES = (
    Case(
        PHLinear,
        {"in_features": 6, "out_features": 9, "n": 3},
        inputs=((4, 6),),
        output=(4, 9),
        vary=(0,),
    ),
    Case(
        PHConv1d,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 5, "n": 2, "padding": 2, "algebra": "complex"},
        inputs=((2, 4, 11),),
        output=(2, 6, 11),
        vary=(0, 2),
    ),
    Case(
        PHConv2d,
        {"in_channels": 6, "out_channels": 9, "kernel_size": (3, 1), "n": 3, "stride": 2, "padding": (1, 0)},
        inputs=((2, 6, 9, 7),),
        output=(2, 9, 5, 4),
        minimal=(1, 6, 1, 1),
        raises=(
            Raises(
                ValueError,
                "n must divide the channels that go in: got 4 and 6",
                {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "n": 4},
            ),
            Raises(
                ValueError,
                "the quaternion algebra has n = 4: got 2",
                {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "n": 2, "algebra": "quaternion"},
            ),
            Raises(
                ValueError,
                "a fixed algebra must be named: got algebra=None and fixed=True",
                {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "n": 4, "fixed": True},
            ),
            Raises(
                ValueError,
                "algebra must be one of ['complex', 'quaternion']: got 'octonion'",
                {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "n": 8, "algebra": "octonion"},
            ),
        ),
    ),
    Case(
        PHConv2d,
        {
            "in_channels": 4, "out_channels": 8, "kernel_size": 3, "padding": 2, "dilation": 2, "bias": False,
            "algebra": "quaternion", "fixed": True,
        },
        inputs=((2, 4, 7, 5),),
        output=(2, 8, 7, 5),
        id="quaternion",
    ),
    Case(
        PHConv3d,
        {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "n": 2, "padding": 1},
        inputs=((2, 4, 5, 7, 6),),
        output=(2, 4, 5, 7, 6),
        vary=(0, 2, 3, 4),
    ),
)  # fmt: skip
