r"""Layers of the Poincare ball: hyperplanes for linear maps, midpoints for batch norm, Mobius addition for shortcuts.

Paper: van Spengler et al., Poincare ResNet, https://arxiv.org/abs/2303.14027, on the hyperplanes of Shimizu et al.,
Hyperbolic Neural Networks++, https://arxiv.org/abs/2006.08210. As in the authors' code, a map between layers holds
tangent vectors at the origin, along its channels. Two things differ from that code: its conformal factor is
:math:`2 (1 - c |x|^2)` instead of :math:`2 / (1 - c |x|^2)`, and its batch norm has no running statistics.

A convolution needs no unfolded patches here. The exponential map only scales a patch, so its products with the
kernels are an ordinary convolution times a number for every place, which depends on the norm of the patch alone;
and the way of the result back to the tangents is :math:`\mathrm{asinh}(|w|) / |w|` times half of it, in which
nothing is singular.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.ops.poincare import expmap0, gyration, logmap0, midpoint, mobius_add, rim, scale_radially

__all__ = ["PoincareBatchNorm2d", "PoincareConv2d", "PoincareLinear", "poincare_sum"]


def poincare_sum(x: Tensor, y: Tensor, c: float) -> Tensor:
    r"""Return the tangent of :math:`\exp_0(x) \oplus \exp_0(y)`, for tangents along axis 1."""
    return logmap0(mobius_add(expmap0(x, c, 1), expmap0(y, c, 1), c, 1), c, 1)


def _beta(n: float) -> float:
    """Return B(n / 2, 1 / 2)."""
    return math.exp(math.lgamma(n / 2) - math.lgamma((n + 1) / 2)) * math.sqrt(math.pi)


def _signed_distances(
    products: Tensor, norm: Tensor, size: Tensor, offset: Tensor | None, c: float
) -> Tensor:
    """Return the layer's output from products and norms of tangents, the norms of the kernels and their offsets."""
    root = math.sqrt(c)
    length = root * norm.clamp(min=1e-15)
    point = length.tanh().clamp(max=rim(norm.dtype))  # norm of the point in the ball
    conformal = 2 / (1 - point**2)
    size = size.clamp(min=1e-15)
    y = conformal * point / length * root * products / size
    if offset is not None:
        y = y * (2 * root * offset).cosh() - (conformal - 1) * (2 * root * offset).sinh()
    return scale_radially((2 * size * y.asinh()).sinh(), "asinh", 1.0, 1) / (2 * root)


class _Hyperplanes(nn.Module):
    """What both linear layers have: kernels that start as half the identity, and offsets that start at 0."""

    weight: Tensor
    bias: Tensor | None

    def _make(self, shape: tuple[int, ...], bias: bool, c: float, **factory: Any) -> None:
        if c <= 0:
            raise ValueError(f"c must be positive: got {c}")
        self.c = c
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self.bias = nn.Parameter(torch.empty(shape[0], **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as half a (rectangular) identity: the 2 of the distance makes it the identity."""
        with torch.no_grad():
            nn.init.eye_(self.weight.view(len(self.weight), -1)).mul_(0.5)
            if self.bias is not None:
                self.bias.zero_()

    def _outputs(self, products: Tensor, norm: Tensor) -> Tensor:
        shape = (-1, *(1,) * (products.ndim - 2))
        size = torch.linalg.vector_norm(self.weight.flatten(1), dim=1).view(shape)
        offset = None if self.bias is None else self.bias.view(shape)
        return _signed_distances(products, norm, size, offset, self.c)


class PoincareLinear(_Hyperplanes):
    r"""Fully connected layer of `Hyperbolic Neural Networks++ <https://arxiv.org/abs/2006.08210>`_.

    .. math:: y = \frac{w}{1 + \sqrt{1 + c |w|^2}}, \qquad w_k = \frac{1}{\sqrt c} \sinh(\sqrt c\, v_k), \qquad
              v_k = \frac{2 |z_k|}{\sqrt c} \mathrm{asinh}\Bigl(\lambda \sqrt c \bigl\langle x, \tfrac{z_k}{|z_k|}
              \bigr\rangle \cosh(2 \sqrt c\, r_k) - (\lambda - 1) \sinh(2 \sqrt c\, r_k)\Bigr)

    with :math:`\lambda = 2 / (1 - c |x|^2)`: v are the signed distances of x to hyperplanes of normals z and
    offsets r.

    Args:
        in_features, out_features: lengths of input and output.
        c: minus the curvature.
        bias: learn offsets.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in})`, tangents at the origin
        - output: :math:`(N, C_\mathrm{out})`, the same

    Raises:
        ValueError: if `c` is not positive.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        c: float = 0.1,
        *,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self._make((out_features, in_features), bias, c, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tangents of the outputs."""
        return self._outputs(F.linear(x, self.weight), torch.linalg.vector_norm(x, dim=1, keepdim=True))


class PoincareConv2d(_Hyperplanes):
    r"""Convolution of `Poincare ResNet <https://arxiv.org/abs/2303.14027>`_.

    The k tangents of a window are joined to one of :math:`k\, C_\mathrm{in}` numbers, times
    :math:`B(k C_\mathrm{in} / 2, 1/2) / B(C_\mathrm{in} / 2, 1/2)` so that norms stay as they are on average, and
    pass a `PoincareLinear`. As c goes to 0 this becomes an ordinary convolution of kernels :math:`2 z` with offsets
    :math:`-2 |z| r`.

    Args:
        in_channels, out_channels: of input and output.
        kernel_size: odd.
        stride: of the windows.
        c: minus the curvature.
        bias: learn offsets.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`, tangents at the origin along the channels
        - output: :math:`(N, C_\mathrm{out}, \lceil H / s \rceil, \lceil W / s \rceil)`, the same

    Raises:
        ValueError: if `kernel_size` is even or `c` is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        c: float = 0.1,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        self.stride, self.padding = stride, kernel_size // 2
        self.gain = _beta(in_channels * kernel_size**2) / _beta(in_channels)
        self._make((out_channels, in_channels, kernel_size, kernel_size), bias, c, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tangents of the outputs."""
        x, stride = self.gain * x, self.stride
        if self.padding == 0:
            # In torch 2.13 the gradient of a strided 1x1 convolution of few channels in channels-last breaks the heap.
            x, stride = x[:, :, ::stride, ::stride], 1
        products = F.conv2d(x, self.weight, None, stride, self.padding)
        ones = x.new_ones(1, 1, *self.weight.shape[2:])
        squares = F.conv2d(x.square().sum(1, keepdim=True), ones, None, stride, self.padding)
        # A root has no slope at 0, where the direction does not matter either.
        return self._outputs(products, squares.clamp(min=1e-30).sqrt())


class PoincareBatchNorm2d(nn.Module):
    r"""Midpoint batch norm of `Poincare ResNet <https://arxiv.org/abs/2303.14027>`_.

    .. math:: y = \beta \oplus \exp_0\Bigl(\sqrt{\gamma / (\sigma^2 + \epsilon)}\;
              \mathrm{gyr}[\beta, -\mu]\, \log_0(-\mu \oplus x)\Bigr), \qquad \sigma^2 = \mathrm{mean}\; d(x, \mu)^2

    with the midpoint :math:`\mu` of all places of the batch: every point is seen from the mean, carried to the
    learned :math:`\beta` and scaled to the learned variance :math:`\gamma`. In eval mode running statistics take
    the batch's place.

    Args:
        channels: C.
        c: minus the curvature.
        eps: :math:`\epsilon`.
        momentum: weight of a new batch in the running statistics, which are those of tangents.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`, tangents at the origin along the channels

    Raises:
        ValueError: if `c` is not positive.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        channels: int,
        c: float = 0.1,
        *,
        eps: float = 1e-6,
        momentum: float = 0.1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if c <= 0:
            raise ValueError(f"c must be positive: got {c}")
        self.c, self.eps, self.momentum = c, eps, momentum
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mean = nn.Parameter(torch.empty(channels, **factory))
        self.var = nn.Parameter(torch.empty((), **factory))
        self.register_buffer("running_mean", torch.empty(channels, **factory))
        self.register_buffer("running_var", torch.empty((), **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with mean 0 and variance 1."""
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            nn.init.constant_(tensor, float(name.endswith("var")))

    def forward(self, x: Tensor) -> Tensor:
        """Return normed tangents."""
        c = self.c
        x = expmap0(x, c, 1)
        if self.training:
            center = midpoint(x, c, (0, 2, 3), 1)
        else:
            center = expmap0(self.running_mean.view(1, -1, 1, 1), c, 1)
        seen = logmap0(mobius_add(-center, x, c, 1), c, 1)
        var = 4 * seen.square().sum(1).mean() if self.training else self.running_var
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(
                    logmap0(center, c, 1).flatten().to(self.running_mean.dtype), self.momentum
                )
                self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
        target = expmap0(self.mean.view(1, -1, 1, 1), c, 1)
        scale = (self.var / (var + self.eps)).clamp(min=0).sqrt()
        moved = expmap0(scale * gyration(target, -center, seen, c, 1), c, 1)
        return logmap0(mobius_add(target, moved, c, 1), c, 1)


CASES = (
    Case(
        PoincareLinear,
        {"in_features": 5, "out_features": 7},
        inputs=((3, 5),),
        output=(3, 7),
        vary=(0,),
        minimal=(1, 5),
        raises=(Raises(ValueError, "c must be positive: got 0", {"in_features": 5, "out_features": 7, "c": 0}),),
    ),
    Case(
        PoincareConv2d,
        {"in_channels": 3, "out_channels": 4, "stride": 2},
        inputs=((2, 3, 7, 10),),
        output=(2, 4, 4, 5),
        minimal=(1, 3, 1, 1),
        raises=(
            Raises(
                ValueError,
                "kernel_size must be odd and positive: got 4",
                {"in_channels": 3, "out_channels": 4, "kernel_size": 4},
            ),
        ),
    ),
    Case(
        PoincareBatchNorm2d,
        {"channels": 4},
        inputs=((2, 4, 7, 5),),
        output=(2, 4, 7, 5),
        raises=(Raises(ValueError, "c must be positive: got -1", {"channels": 4, "c": -1}),),
    ),
)  # fmt: skip
