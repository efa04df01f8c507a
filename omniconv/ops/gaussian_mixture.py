r"""Mixtures of Gaussians as fields: evaluated, convolved without a grid, rectified, and reduced.

Paper: Celarek et al., Gaussian Mixture Convolution Networks, https://arxiv.org/abs/2202.09153. A mixture is the field

.. math:: m(x) = \sum_i a_i\, e^{-\frac12 (x - b_i)^\top C_i^{-1} (x - b_i)}

with weights a of any sign, packed into a tensor (N, F, K, 1 + d + d d): the weight, the position b and the covariance
C of K components in d dimensions. What differs: TreeHEM reduces a balanced tree,
all nodes of a level at once.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "convolve", "evaluate", "exhaustive_em", "fit_relu", "from_images", "integrate", "pack", "tree_hem", "unpack",
    "volume",
]  # fmt: skip

TINY = 1e-20


def pack(weights: Tensor, positions: Tensor, covariances: Tensor) -> Tensor:
    """Return the mixture (N, F, K, 1 + d + d d) of weights (N, F, K), positions (..., d), covariances (..., d, d)."""
    return torch.cat([weights[..., None], positions, covariances.flatten(-2)], -1)


def unpack(mixture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights (N, F, K), positions (..., d) and covariances (..., d, d) of a mixture.

    Raises:
        ValueError: if the last axis is no 1 + d + d d numbers.
    """
    d = 1
    while 1 + d + d * d < mixture.shape[-1]:
        d += 1
    if mixture.shape[-1] != 1 + d + d * d:
        raise ValueError(f"a component needs 1 + d + d * d numbers: got {mixture.shape[-1]}")
    return mixture[..., 0], mixture[..., 1 : 1 + d], mixture[..., 1 + d :].unflatten(-1, (d, d))


def _determinant(covariances: Tensor) -> Tensor:
    """Return determinants; those of all but singular matrices, of axes beyond 40 to 1, are raised a little."""
    c, d = covariances, covariances.shape[-1]
    if d == 1:
        det = c[..., 0, 0]
    elif d == 2:
        det = c[..., 0, 0] * c[..., 1, 1] - c[..., 0, 1] * c[..., 1, 0]
    elif d == 3:
        det = (c[..., 0, :] * torch.linalg.cross(c[..., 1, :], c[..., 2, :])).sum(-1)
    else:
        det = torch.linalg.det(c)
    scale = c.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
    return torch.maximum(det, (0.05 * scale) ** d + TINY)


def _precision(covariances: Tensor) -> Tensor:
    """Return inverses; written out for up to three dimensions, where LAPACK is slow on many small matrices."""
    c, d = covariances, covariances.shape[-1]
    if d == 1:
        adjugate = torch.ones_like(c)
    elif d == 2:
        trace = (c[..., 0, 0] + c[..., 1, 1])[..., None, None]
        adjugate = trace * torch.eye(2, dtype=c.dtype, device=c.device) - c
    elif d == 3:
        a, b, e = c.unbind(-2)
        columns = [torch.linalg.cross(b, e), torch.linalg.cross(e, a), torch.linalg.cross(a, b)]
        adjugate = torch.stack(columns, -1)
    else:
        return torch.linalg.inv(c)
    return adjugate / _determinant(c)[..., None, None]


def volume(covariances: Tensor) -> Tensor:
    """Return the integrals (N, F, K) of Gaussians of height one and covariances (N, F, K, d, d)."""
    return ((2 * torch.pi) ** covariances.shape[-1] * _determinant(covariances)).sqrt()


def _features(positions: Tensor, covariances: Tensor | float = 0.0) -> Tensor:
    """Return 1, E[x] and E[x x'] of every component, flat."""
    second = positions[..., None] * positions[..., None, :] + covariances
    return torch.cat([torch.ones_like(positions[..., :1]), positions, second.flatten(-2)], -1)


def _forms(positions: Tensor, precision: Tensor) -> Tensor:
    """Return what `_features` is multiplied by to give E[(x - b)' P (x - b)]."""
    linear = (precision * positions[..., None, :]).sum(-1)
    constant = (linear * positions).sum(-1, keepdim=True)
    return torch.cat([constant, -2 * linear, precision.flatten(-2)], -1)


def _gaussians(x: Tensor, positions: Tensor, covariances: Tensor) -> Tensor:
    """Return the value (..., P, K) at every point (..., P, d) of every Gaussian of height one."""
    middle = positions.mean(-2, keepdim=True)
    forms = _forms(positions - middle, _precision(covariances))
    # What is smaller than e^-60 is held there: numbers near the end of float32's range make CPUs slow.
    return torch.exp((_features(x - middle) @ (-0.5 * forms).mT).clamp(-60, 0))


def evaluate(mixture: Tensor, x: Tensor) -> Tensor:
    """Return the values (N, F, P) of a mixture at points x (P, d), or (N, F, P, d)."""
    weights, positions, covariances = unpack(mixture)
    return (_gaussians(x, positions, covariances) @ weights[..., None])[..., 0]


def integrate(mixture: Tensor) -> Tensor:
    """Return the integrals (N, F) of a mixture over all space."""
    weights, _, covariances = unpack(mixture)
    return (weights * volume(covariances)).sum(-1)


def convolve(mixture: Tensor, kernels: Tensor) -> Tensor:
    r"""Convolve mixtures with mixtures exactly, as in `GMCN <https://arxiv.org/abs/2202.09153>`_.

    .. math:: y_{n,o} = \sum_f m_{n,f} * k_{o,f}, \qquad
        (a, b, C) * (\alpha, \beta, \Gamma)
        = \Big(a \alpha \sqrt{\tfrac{(2 \pi)^d |C| |\Gamma|}{|C + \Gamma|}},\; b + \beta,\; C + \Gamma\Big)

    Args:
        mixture: the data.
        kernels: a mixture for every pair of channels.

    Shapes:
        - mixture: :math:`(N, F, K, 1 + d + d^2)`
        - kernels: :math:`(O, F, L, 1 + d + d^2)`
        - output: :math:`(N, O, F K L, 1 + d + d^2)`

    Raises:
        ValueError: if channels or dimensions differ.
    """
    a, b, c = (part[:, None, :, :, None] for part in unpack(mixture))
    alpha, beta, gamma = (part[None, :, :, None, :] for part in unpack(kernels))
    if mixture.shape[1] != kernels.shape[1] or mixture.shape[-1] != kernels.shape[-1]:
        raise ValueError(
            "mixture (N, F, K, M) and kernels (O, F, L, M) must agree in F and M: "
            f"got {tuple(mixture.shape)} and {tuple(kernels.shape)}"
        )
    covariances = c + gamma
    weights = a * volume(c) * (alpha * volume(gamma)) / volume(covariances)
    return pack(weights, b + beta, covariances).flatten(2, 4)


def fit_relu(mixture: Tensor, bias: Tensor | None = None, *, steps: int = 1) -> Tensor:
    r"""Return a mixture near :math:`\max(0, m + c) - \max(0, c)`, with the same positions and covariances.

    Weights begin as :math:`\max(0, a)`. Each step multiplies them by the ratio of the wanted field to the fitted one
    at their positions, which corrects what overlapping neighbours add.

    Args:
        mixture: m, (N, F, K, 1 + d + d d).
        bias: c, (F); 0 by default. The constant max(0, c) is left to the next layer's bias.
        steps: how often the weights are corrected.
    """
    weights, positions, covariances = unpack(mixture)
    matrix = _gaussians(positions, positions, covariances)
    offset = weights.new_zeros(1, 1) if bias is None else bias[:, None]
    target = ((matrix @ weights[..., None])[..., 0] + offset).relu() - offset.relu()
    floor = 0.01 * weights.abs().mean(-1, keepdim=True) + TINY
    fitted = weights.relu() + floor
    for _ in range(steps):
        fitted = fitted.abs()
        fitted = fitted * target / ((matrix @ fitted[..., None])[..., 0] + floor)
    return pack(fitted, positions, covariances)


def _maximise(groups: Tensor, shares: Tensor) -> Tensor:
    """Return the mixtures (..., S, M) whose components have the moments of the shares (..., K, S) of `groups`.

    Here and below the first number of a component is its integral, not its height.
    """
    mass, positions, covariances = unpack(groups)
    middle = positions.mean(-2, keepdim=True)
    # Empty components count for next to nothing, so that all of them together still have a mean.
    positive = mass.abs() + 1e-6 * mass.abs().amax(-1, keepdim=True) + TINY
    moments = (shares * positive[..., None]).mT @ _features(positions - middle, covariances)
    _, mean, second = unpack(moments / moments[..., :1])
    spread = second - mean[..., None] * mean[..., None, :]
    return pack((shares.mT @ mass[..., None])[..., 0], mean + middle, spread)


def _share(groups: Tensor, fitted: Tensor) -> Tensor:
    """Return how much (..., K, S) of each component belongs to each fitted one, by Kullback-Leibler divergence."""
    _, positions, covariances = unpack(groups)
    mass, means, spreads = unpack(fitted)
    middle = positions.mean(-2, keepdim=True)
    forms = _forms(means - middle, _precision(spreads))
    distance = (
        _features(positions - middle, covariances) @ forms.mT + _determinant(spreads).log()[..., None, :]
    )
    shares = (mass.abs().clamp_min(TINY).log()[..., None, :] - 0.5 * distance).softmax(-1)
    # Nobody is left with nothing, which has neither mean nor covariance.
    return (1 - 1e-6) * shares + 1e-6 / shares.shape[-1]


def _with_mass(mixture: Tensor) -> Tensor:
    weights, positions, covariances = unpack(mixture)
    return pack(weights * volume(covariances), positions, covariances)


def _with_height(mixture: Tensor) -> Tensor:
    mass, positions, covariances = unpack(mixture)
    return pack(mass / volume(covariances), positions, covariances)


def _along_curve(mass: Tensor, positions: Tensor) -> Tensor:
    """Return the order of components along a Z-curve through their box, the empty ones last."""
    empty = mass == 0
    low = positions.masked_fill(empty[..., None], math.inf).amin(2, keepdim=True)
    high = positions.masked_fill(empty[..., None], -math.inf).amax(2, keepdim=True)
    cell = ((positions - low) / (high - low).clamp_min(TINY) * 1023).nan_to_num().clamp(0, 1023).long()
    d = positions.shape[-1]
    bits = torch.arange(10, device=mass.device)
    places = 1 << (bits * d + torch.arange(d, device=mass.device)[:, None])
    code = ((cell[..., None] >> bits & 1) * places).sum((-2, -1))
    return code.masked_fill(empty, 1 << (10 * d)).argsort(dim=-1, stable=True)


@torch.no_grad()
def _slots(mass: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Spread the non-empty components along the curve over `count` slots.

    Returns:
        which component (N, F, count) stands in a slot, and whether it is there for the first time.
    """
    full = (mass != 0).sum(-1, keepdim=True).clamp_min(1)
    rank = torch.arange(count, device=mass.device) * full // count
    first = torch.cat([torch.ones_like(rank[..., :1]), rank.diff()], -1)
    return _along_curve(mass, positions).gather(-1, rank), first


def tree_hem(mixture: Tensor, components: int) -> Tensor:
    """Reduce mixtures to `components` Gaussians, neighbours first, by hierarchical expectation maximisation.

    Components are laid along a space-filling curve; every node of a binary tree over it fits four Gaussians (two or
    one if four do not divide `components`) to the eight of its children: pairs are merged, then one step of EM
    shares all eight among the four. Integral and, for weights of one sign, mean and covariance of the whole are kept.

    Args:
        mixture: (N, F, K, 1 + d + d d).
        components: how many remain; a mixture of no more than that is returned as it is.

    Raises:
        ValueError: if `components` is not positive.
    """
    if components < 1:
        raise ValueError(f"components must be positive: got {components}")
    levels = 0
    while components << levels < mixture.shape[2]:
        levels += 1
    if levels == 0:
        return mixture
    reduced = _with_mass(mixture)
    mass, positions, _ = unpack(reduced)
    index, first = _slots(mass, positions, components << levels)
    reduced = reduced.gather(2, index[..., None].expand(*index.shape, mixture.shape[-1]))
    reduced = torch.cat([reduced[..., :1] * first[..., None], reduced[..., 1:]], -1)
    kept = math.gcd(components, 4)
    pairs = torch.eye(kept, dtype=mixture.dtype, device=mixture.device).repeat_interleave(2, 0)
    for _ in range(levels):
        groups = reduced.unflatten(2, (-1, 2 * kept))
        merged = _maximise(groups, pairs)
        reduced = _maximise(groups, _share(groups, merged)).flatten(2, 3)
    return _with_height(reduced)


def exhaustive_em(mixture: Tensor, components: int, *, steps: int = 20) -> Tensor:
    """Reduce mixtures to `components` Gaussians by EM over all of them at once, from those of the largest integrals.

    Args:
        mixture: (N, F, K, 1 + d + d d).
        components: how many remain, at most K.
        steps: of expectation and maximisation.
    """
    groups = _with_mass(mixture)
    largest = groups[..., 0].abs().topk(components, -1).indices
    fitted = groups.gather(2, largest[..., None].expand(*largest.shape, mixture.shape[-1]))
    for _ in range(steps):
        fitted = _maximise(groups, _share(groups, fitted))
    return _with_height(fitted)


def from_images(images: Tensor, components: int) -> Tensor:
    """Return mixtures of images (N, C, H, W): a Gaussian of half a pixel for every pixel, reduced by `tree_hem`.

    Positions are (row, column) in pixels. A constant 1 becomes a field of about 1.
    """
    n, channels, height, width = images.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], -1).to(images)
    variance = 0.25
    covariance = variance * torch.eye(2).to(images)
    shape = (n, channels, height * width)
    return tree_hem(
        pack(
            images.flatten(2) / (2 * torch.pi * variance),
            places.expand(*shape, 2),
            covariance.expand(*shape, 2, 2),
        ),
        components,
    )
