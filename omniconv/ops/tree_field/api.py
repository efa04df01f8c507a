"""Products with M = [f(dist(i, j))] for the distances on a tree, in near-linear time.

Paper: Choromanski et al., Fast Tree-Field Integrators: From Low Displacement Rank to Topological Transformers,
https://arxiv.org/abs/2406.15881. What differs: functions that have no finite rank are multiplied on lattice weights
as Hankel matrices by FFT, whatever the function, and on other weights by Chebyshev interpolation in the logarithm of
the distance, which keeps the digits that the paper's products with Cauchy matrices lose.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from omniconv.ops.tree_field.tree import Cuts, IntegratorTree

__all__ = ["tree_field"]

METHODS = ("auto", "lattice", "chebyshev", "dense")


def tree_field(
    x: Tensor, tree: IntegratorTree, f: Callable[[Tensor], Tensor], *, method: str = "auto"
) -> Tensor:
    r"""Integrate a field over a tree, as in `FTFI <https://arxiv.org/abs/2406.15881>`_.

    .. math:: y_i = \sum_j f(\mathrm{dist}(i, j))\, x_j

    At a cut of the tree the distances between its two sides are sums :math:`x_i + y_j` of distances to the pivot.
    If f has `factors`, these parts of the matrix have its rank. On lattice weights they are Hankel matrices; FFTs
    multiply them. Other smooth functions are interpolated in both distances, as far as it takes to reach rounding
    errors; where 128 points do not reach them, the parts are multiplied as they are.

    Args:
        x: the field, one row a vertex.
        tree: the tree.
        f: elementwise function of distances; one of `omniconv.ops.tree_field.functions`, or any other. Gradients
            reach the tensors it holds.
        method: "lattice", "chebyshev" or "dense" to choose how all functions are multiplied.

    Shapes:
        - x and output: :math:`(*, n, D)`

    Raises:
        ValueError: if x does not fit the tree, there is no such method, or "lattice" is asked of other weights.
    """
    n = tree.count
    if x.ndim < 2 or x.shape[-2] != n:
        raise ValueError(f"x must be (*, {n}, D), one row a vertex: got {tuple(x.shape)}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}: got {method!r}")
    if method == "lattice" and tree.step is None:
        raise ValueError("method 'lattice' needs weights that are small multiples of one number")
    # There is no autocast to switch off on the meta device.
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        return _integrate(x, tree, f, method)


def _integrate(x: Tensor, tree: IntegratorTree, f: Callable[[Tensor], Tensor], method: str) -> Tensor:
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    field = work.movedim(-2, 0).flatten(1)
    # Vertex n, which stands where there is none, has a row of zeros.
    field = torch.cat([field, field.new_zeros(1, field.shape[1])])
    multiply = _choose(f, tree, field, method)
    y = f(field.new_zeros(())) * field
    within = f(tree.leaf_distance.to(field)) * (1 - torch.eye(tree.leaf_distance.shape[-1]).to(field))
    vertex = tree.leaf_vertex.to(x.device)
    y = y.index_add(0, vertex.flatten(), (within @ field[vertex]).flatten(0, 1))
    for cuts in tree.cuts:
        vertex = cuts.vertex.to(x.device)
        across = multiply(cuts, cuts.distance.to(field), field[vertex])
        y = y.index_add(0, vertex.flatten(), across.flatten(0, 2))
    sizes = work.movedim(-2, 0).shape
    return y[:-1].reshape(sizes).movedim(0, -2).to(x.dtype)


def _choose(
    f: Callable[[Tensor], Tensor], tree: IntegratorTree, like: Tensor, method: str
) -> Callable[[Cuts, Tensor, Tensor], Tensor]:
    """Return the function of (cuts, distance, field) that gives every side the integral over the other one."""
    factors = getattr(f, "factors", None)
    if method == "auto" and factors is not None:

        def exact(cuts: Cuts, distance: Tensor, field: Tensor) -> Tensor:
            u, v = factors(distance)
            return _low_rank(u, v, field)

        return exact
    if method == "lattice" or (method == "auto" and tree.step is not None):
        return lambda cuts, distance, field: _hankel(f, cuts, tree.step or 1.0, field)
    reach = max((cuts.reach for cuts in tree.cuts), default=0.0)
    found = _interpolation(f, reach, like) if method != "dense" and tree.cuts else None
    if found is None:
        return lambda cuts, distance, field: _dense(f, distance, field)
    scale, points = found
    coefficients = _coefficients(f, reach, scale, points, like)

    def interpolated(cuts: Cuts, distance: Tensor, field: Tensor) -> Tensor:
        if distance.shape[-1] <= points:
            return _dense(f, distance, field)
        basis = _chebyshev(distance, reach, scale, points)
        return _low_rank(basis @ coefficients, basis, field)

    return interpolated


def _low_rank(u: Tensor, v: Tensor, field: Tensor) -> Tensor:
    return u @ (v.mT @ field).flip(1)


def _dense(f: Callable[[Tensor], Tensor], distance: Tensor, field: Tensor) -> Tensor:
    matrix = f(distance[:, 0, :, None] + distance[:, 1, None, :])
    return torch.stack([matrix @ field[:, 1], matrix.mT @ field[:, 0]], 1)


def _hankel(f: Callable[[Tensor], Tensor], cuts: Cuts, step: float, field: Tensor) -> Tensor:
    """Multiply by f at sums of whole numbers: a correlation with the field gathered by distance."""
    length = round(cuts.reach / step) + 1
    place = (cuts.distance.to(field.device) / step).round().long()[..., None].expand(field.shape)
    gathered = field.new_zeros(*field.shape[:2], length, field.shape[-1]).scatter_add(2, place, field)
    values = f(step * torch.arange(2 * length, device=field.device, dtype=field.dtype))
    spectrum = torch.fft.rfft(values)[:, None] * torch.fft.rfft(gathered, 2 * length, dim=2).conj()
    return torch.fft.irfft(spectrum, 2 * length, dim=2)[:, :, :length].flip(1).gather(2, place)


def _chebyshev(distance: Tensor, reach: float, scale: float, points: int) -> Tensor:
    """Return the Chebyshev polynomials (*distance, points) of log(1 + d / scale), whose range is made [-1, 1]."""
    t = 2 * torch.log1p(distance / scale) / torch.log1p(distance.new_tensor(reach / scale)) - 1
    basis = [torch.ones_like(t), t]
    while len(basis) < points:
        basis.append(2 * t * basis[-1] - basis[-2])
    return torch.stack(basis, -1)


def _coefficients(
    f: Callable[[Tensor], Tensor], reach: float, scale: float, points: int, like: Tensor
) -> Tensor:
    """Return the matrix C of f(x + y) = sum_ab C_ab T_a(x) T_b(y), exact where x and y are nodes."""
    t = torch.cos(torch.pi * (torch.arange(points).to(like) + 0.5) / points)
    nodes = scale * torch.expm1((t + 1) / 2 * torch.log1p(like.new_tensor(reach / scale)))
    transform = _chebyshev(nodes, reach, scale, points).mT / points
    transform = torch.cat([transform[:1], 2 * transform[1:]])
    return transform @ f(nodes[:, None] + nodes) @ transform.mT


def _interpolation(f: Callable[[Tensor], Tensor], reach: float, like: Tensor) -> tuple[float, int] | None:
    """Return the scale of the logarithm and the fewest points that interpolate f to rounding errors, or None."""
    tolerance = 1e-6 if like.dtype == torch.float32 else 1e-11
    like = like.detach().double()
    probe = reach * torch.linspace(0, 1, 61).to(like) ** 3
    with torch.no_grad():
        wanted = f(probe[:, None] + probe)
        for points in (8, 16, 24, 32, 48, 64, 96, 128):
            for scale in (10 * reach, reach, 0.1 * reach, 0.01 * reach, 0.001 * reach):
                basis = _chebyshev(probe, reach, scale, points)
                got = basis @ _coefficients(f, reach, scale, points, like) @ basis.mT
                if float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max()):
                    return scale, points
    return None
