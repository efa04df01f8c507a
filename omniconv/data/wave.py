"""Waves on a square membrane: fields for surrogates to learn, from a solver whose accuracy is known.

Second-order finite differences in space and time (leapfrog) of the wave equation on the unit square, whose edges
reflect.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.core.seeds import generator

__all__ = ["wave_2d", "wave_energy", "wave_runs", "wave_step_limit"]

Boundary = Literal["fixed", "free"]


def _spacing(size: int, boundary: Boundary) -> float:
    """Points of a fixed membrane are those between its edges; those of a free one are the middles of cells."""
    return 1 / (size + 1) if boundary == "fixed" else 1 / size


def _padded(u: Tensor, boundary: Boundary) -> Tensor:
    return F.pad(u, (1, 1, 1, 1), mode="constant" if boundary == "fixed" else "replicate")


def wave_step_limit(size: int, speed: float = 1.0, boundary: Boundary = "fixed") -> float:
    """Return the longest time step with which the solver is stable on `size` points a side."""
    return _spacing(size, boundary) / (speed * math.sqrt(2))


def wave_2d(
    initial: Tensor, steps: int, dt: float, *, speed: float | Tensor = 1.0, boundary: Boundary = "fixed"
) -> Tensor:
    r"""Solve the wave equation from rest.

    .. math:: \partial_t^2 u = c^2 \Delta u, \qquad
              u^{n+1} = 2 u^n - u^{n-1} + c^2 \frac{\Delta t^2}{h^2}
              \bigl(u^n_{\leftarrow} + u^n_{\rightarrow} + u^n_{\uparrow} + u^n_{\downarrow} - 4 u^n\bigr)

    Args:
        initial: the field at time 0, at rest.
        steps: time steps.
        dt: their length.
        speed: c, a number or a field (S, S).
        boundary: "fixed" keeps the field zero at the edges, which reflect it turned over; "free" reflects it upright.

    Shapes:
        - initial: :math:`(N, S, S)`
        - output: :math:`(N, \mathrm{steps} + 1, S, S)`, from the initial field on

    Raises:
        ValueError: if the field is not square, or `dt` is too long to be stable.
    """
    size = initial.shape[-1]
    if initial.ndim != 3 or initial.shape[1] != size:
        raise ValueError(f"initial must be (N, S, S): got {tuple(initial.shape)}")
    fastest = float(torch.as_tensor(speed).max())
    limit = wave_step_limit(size, fastest, boundary)
    if not 0 < dt <= limit:
        raise ValueError(f"dt must be positive and at most {limit:.4g} for {size} points a side: got {dt}")
    courant = (speed * dt / _spacing(size, boundary)) ** 2

    def acceleration(u: Tensor) -> Tensor:
        p = _padded(u, boundary)
        return courant * (p[:, 1:-1, :-2] + p[:, 1:-1, 2:] + p[:, :-2, 1:-1] + p[:, 2:, 1:-1] - 4 * u)

    fields = [initial, initial + acceleration(initial) / 2]
    while len(fields) <= steps:
        fields.append(2 * fields[-1] - fields[-2] + acceleration(fields[-1]))
    return torch.stack(fields[: steps + 1], 1)


def wave_energy(
    before: Tensor, after: Tensor, dt: float, *, speed: float | Tensor = 1.0, boundary: Boundary = "fixed"
) -> Tensor:
    r"""Return the energy between two successive fields (N, S, S), which the solver keeps.

    .. math:: E = \frac{h^2}{2} \sum \frac{1}{c^2} \Bigl(\frac{u^{n+1} - u^n}{\Delta t}\Bigr)^2
              + \frac{1}{2} \sum D u^{n+1} \cdot D u^n

    with the differences D of neighbours, those across the edges included.
    """
    spacing = _spacing(before.shape[-1], boundary)
    motion = (((after - before) / dt / speed).square() * spacing**2).sum((1, 2))
    first, second = _padded(before, boundary), _padded(after, boundary)
    down = (first[:, :, 1:-1].diff(dim=1) * second[:, :, 1:-1].diff(dim=1)).sum((1, 2))
    across = (first[:, 1:-1].diff(dim=2) * second[:, 1:-1].diff(dim=2)).sum((1, 2))
    return (motion + down + across) / 2


def wave_runs(
    count: int,
    size: int = 32,
    *,
    frames: int = 8,
    time: float = 0.4,
    seed: int = 0,
    boundary: Boundary = "fixed",
) -> tuple[Tensor, Tensor]:
    """Return runs of the solver from one to three random bumps.

    Args:
        count: N, runs.
        size: S, points a side.
        frames: T, fields to return of each run, at equal distances.
        time: of the last field; in a time of 1 a wave crosses the square.
        seed: of the bumps.
        boundary: see `wave_2d`.

    Returns:
        Initial fields (N, 1, S, S) and the fields that follow (N, T, S, S), float32.
    """
    random = generator(seed, "waves")

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 3, 1, 1, dtype=torch.float64, generator=random)

    x, y, width = uniform(0.15, 0.85), uniform(0.15, 0.85), uniform(0.06, 0.12)
    present = torch.rand(count, 3, 1, 1, generator=random) < 0.5
    present[:, 0] = True
    height = uniform(-1, 1).sign() * uniform(0.5, 1) * present
    offset = 1 if boundary == "fixed" else 0.5
    places = (torch.arange(size, dtype=torch.float64) + offset) * _spacing(size, boundary)
    bumps = height * torch.exp(-((places[:, None] - y).square() + (places - x).square()) / (2 * width**2))
    initial = bumps.sum(1)
    stride = math.ceil(time / frames / (0.7 * wave_step_limit(size, boundary=boundary)))
    fields = wave_2d(initial, frames * stride, time / frames / stride, boundary=boundary)
    return initial[:, None].float(), fields[:, stride::stride].float()
