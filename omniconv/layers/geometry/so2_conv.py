"""Equivariant convolution along edges whose cost grows with the third power of the degree, and its nonlinearity.

Paper: Passaro and Zitnick, Reducing SO(3) Convolutions to SO(2) for Efficient Equivariant GNNs (eSCN),
https://arxiv.org/abs/2302.03655. Layers here act on edges or nodes by themselves; a message is
`h.new_zeros(h.shape).index_add(0, receivers, conv(h[senders], vectors))`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises
from omniconv.ops.so2_conv.api import so2_conv
from omniconv.ops.so2_conv.weights import weight_count
from omniconv.ops.spherical_harmonics import sphere_points, spherical_harmonics

__all__ = ["SO2Conv", "SphereActivation"]


class SO2Conv(nn.Module):
    r"""Convolution of spherical-harmonic features along their edges, of `eSCN <https://arxiv.org/abs/2302.03655>`_.

    .. math:: y = D(R)\, \mathrm{SO2}\big(D(R)^T (s \odot x)\big), \qquad s_{lc} = (A e)_{lc} + a_{lc}

    with a rotation R of the polar axis onto the edge. SO2 mixes degrees and channels among orders m and -m, see
    `omniconv.ops.so2_conv`. The scales s carry what else is known of the edge, such as a radial basis of its length
    or the kinds of its atoms.

    Args:
        in_channels, out_channels: channels of input and output.
        degree: L of the features.
        order: M, highest order that is kept; by default L.
        edge_channels: numbers that describe an edge; 0 for none, and no scales.
        device, dtype: of the parameters.

    Shapes:
        - x: :math:`(E, (L + 1)^2, C)`, see `spherical_harmonics` for the order of rows
        - vectors: :math:`(E, 3)`, of any length but zero
        - edges: :math:`(E, F)`, if there are edge channels
        - output: :math:`(E, (L + 1)^2, C')`

    Raises:
        ValueError: if `order` lies outside [0, degree], or the shapes do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        degree: int,
        *,
        order: int | None = None,
        edge_channels: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.degree, self.order = degree, degree if order is None else order
        if not 0 <= self.order <= degree:
            raise ValueError(f"order must lie between 0 and the degree {degree}: got {order}")
        count = weight_count(degree, self.order)
        self.weight = nn.Parameter(torch.empty(count, out_channels, in_channels, device=device, dtype=dtype))
        self.scale = None
        if edge_channels:
            self.scale = nn.Linear(edge_channels, (degree + 1) * in_channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, for outputs about as large as inputs; scales begin near 1."""
        # An output sees all degrees, by two matrices unless m = 0.
        nn.init.normal_(self.weight, std=1 / math.sqrt(2 * (self.degree + 1) * self.weight.shape[2]))
        if self.scale is not None:
            self.scale.reset_parameters()
            nn.init.ones_(self.scale.bias)

    def forward(self, x: Tensor, vectors: Tensor, edges: Tensor | None = None) -> Tensor:
        """Convolve the features of every edge with a filter along its vector."""
        if (edges is None) != (self.scale is None):
            raise ValueError("edges must be given if, and only if, the layer has edge_channels")
        if self.scale is not None and edges is not None:
            scales = self.scale(edges).unflatten(1, (self.degree + 1, x.shape[2]))
            x = x * scales[:, [n for n in range(self.degree + 1) for _ in range(2 * n + 1)]]
        return so2_conv(x, vectors, self.weight, order=self.order)

    def extra_repr(self) -> str:
        """Show the sizes."""
        _, out, channels = self.weight.shape
        return f"{channels}, {out}, degree={self.degree}, order={self.order}"


class SphereActivation(nn.Module):
    r"""Nonlinearity of `eSCN <https://arxiv.org/abs/2302.03655>`_: applied to the function, at points of the sphere.

    .. math:: y_{lm} = \int a\Big(\sum_{l'm'} x_{l'm'} Y_{l'm'}(r)\Big) Y_{lm}(r)\, dr

    The integral is a sum over points. It is equivariant as far as these resolve the activated function.

    Args:
        degree: L of the features.
        act: makes the activation; it gets (N, points, C), so that a network over channels will do as well.
        resolution: degree up to which the points integrate exactly; by default 3 L.

    Shapes:
        - input and output: :math:`(N, (L + 1)^2, C)`

    Raises:
        ValueError: if `resolution` is below 2 L, where even the identity would not come back.
    """

    grid: Tensor
    back: Tensor

    def __init__(
        self, degree: int, act: Callable[[], nn.Module] = nn.SiLU, *, resolution: int | None = None
    ) -> None:
        super().__init__()
        fine = 3 * degree if resolution is None else resolution
        if fine < 2 * degree:
            raise ValueError(f"resolution must be at least twice the degree {degree}: got {resolution}")
        points, weights = (torch.tensor(part.tolist(), dtype=torch.float64) for part in sphere_points(fine))
        grid = spherical_harmonics(points, degree)
        self.register_buffer("grid", grid.to(torch.get_default_dtype()), persistent=False)
        back = (weights[:, None] * grid).T
        self.register_buffer("back", back.to(torch.get_default_dtype()), persistent=False)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """Activate the functions on the sphere whose coefficients are `x`."""
        return self.back @ self.act(self.grid @ x)


CASES = (
    Case(
        SO2Conv, {"in_channels": 3, "out_channels": 4, "degree": 2}, ((5, 9, 3), (5, 3)), (5, 9, 4), vary=(0,),
        raises=(
            Raises(ValueError, "order must lie between 0 and the degree 2: got 3", {"order": 3}),
            Raises(
                ValueError, "edges must be given if, and only if, the layer has edge_channels", {"edge_channels": 2},
                ((5, 9, 3), (5, 3)),
            ),
        ),
    ),
    Case(
        SO2Conv, {"in_channels": 2, "out_channels": 3, "degree": 3, "order": 1, "edge_channels": 4},
        ((5, 16, 2), (5, 3), (5, 4)), (5, 16, 3), id="scaled", vary=(0,),
    ),
    Case(
        SphereActivation, {"degree": 2}, ((5, 9, 3),), (5, 9, 3), vary=(0, 2),
        raises=(Raises(ValueError, "resolution must be at least twice the degree 2: got 3", {"resolution": 3}),),
    ),
)  # fmt: skip
