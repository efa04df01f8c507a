"""SO(3)-equivariant convolution along edges, reduced to rotations about the edge."""

from torch import Tensor

from omniconv.ops.dispatch import Implementation, Table
from omniconv.ops.so2_conv import _torch
from omniconv.ops.so2_conv.reference import reference
from omniconv.ops.so2_conv.weights import weight_count

__all__ = ["so2_conv"]


def so2_conv(
    x: Tensor, directions: Tensor, weight: Tensor, *, order: int | None = None, impl: str = "auto"
) -> Tensor:
    r"""Convolve spherical-harmonic features with a filter along their edge, as `eSCN <https://arxiv.org/abs/2302.03655>`_.

    In a frame whose polar axis is the edge, what turns with it must keep the order m up to its sign,

    .. math:: y_m = W_m x_m - W_{-m} x_{-m}, \qquad y_{-m} = W_m x_{-m} + W_{-m} x_m, \qquad y_0 = W_0 x_0,

    where every matrix couples all degrees :math:`l \ge m` and all channels. With all orders these are the full tensor
    products with a filter of spherical harmonics of the edge, `omniconv.ops.so2_conv.weights` changes weights of
    either form into the other's; here they cost :math:`L^3` for a pair of channels instead of :math:`L^6`.

    Args:
        x: features of E edges, the rows of degree l and order m as `spherical_harmonics` has them.
        directions: of the edges, of any length but zero.
        weight: T numbers for every pair of channels, ordered by output degree, input degree, and m.
        order: M, highest order that is kept, for less work; by default L.
        impl: which implementation; "auto" takes the fastest, see `omniconv.ops.explain`.

    Shapes:
        - x: :math:`(E, (L + 1)^2, C)`
        - directions: :math:`(E, 3)`
        - weight: :math:`(T, C', C)` with :math:`T = \sum_{k, l \le L} (2 \min(k, l, M) + 1)`
        - output: :math:`(E, (L + 1)^2, C')`

    Raises:
        ValueError: if the shapes or `order` do not fit together, or `impl` cannot take the call.
    """
    call = _prepare(x, directions, weight, order=order)
    return TABLE.select(impl, call).run(*call)


def _prepare(
    x: Tensor, directions: Tensor, weight: Tensor, *, order: int | None = None
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    degree = 0
    # By comparison rather than a square root, which compilers cannot take of a size.
    while x.ndim == 3 and (degree + 1) ** 2 < x.shape[1]:
        degree += 1
    if x.ndim != 3 or (degree + 1) ** 2 != x.shape[1]:
        raise ValueError(f"x must be (E, (L + 1)^2, C): got {tuple(x.shape)}")
    if directions.ndim != 2 or directions.shape[1] != 3:
        raise ValueError(f"directions must be (E, 3): got {tuple(directions.shape)}")
    most = degree if order is None else order
    if not 0 <= most <= degree:
        raise ValueError(f"order must lie between 0 and the degree {degree}: got {order}")
    count = weight_count(degree, most)
    if weight.ndim != 3 or weight.shape[0] != count or weight.shape[2] != x.shape[2]:
        raise ValueError(
            f"weight must be ({count}, C', {x.shape[2]}) for degree {degree} and order {most}: "
            f"got {tuple(weight.shape)}"
        )
    return x, directions, weight, degree, most


TABLE = Table(
    "so2_conv",
    _prepare,
    reference,
    (Implementation("torch", _torch.run, _torch.supports, _torch.estimate),),
)
