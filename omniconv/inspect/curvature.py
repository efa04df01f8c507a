"""The shape of a loss around trained weights: largest curvatures, and slices along directions of the filters' sizes.

Papers: Park and Kim, How Do Vision Transformers Work?, https://arxiv.org/abs/2202.06709 (spectra of the largest Hessian
eigenvalues over mini-batches, with weight decay); Li et al., Visualizing the Loss Landscape of Neural Nets,
https://arxiv.org/abs/1712.09913 (filter-normalised directions).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from omniconv.core.seeds import generator
from omniconv.inspect.artifact import Artifact
from omniconv.inspect.modes import evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HessianSpectrum", "Landscape", "Loss", "hessian_eigenvalues", "loss_landscape"]

Loss = Callable[[nn.Module], Tensor]
"""Takes a model and returns its loss on some data."""


class HessianSpectrum(Artifact):
    """`data["eigenvalue"]` is (B, K): the K largest eigenvalues of every batch's Hessian, by size."""

    title = "Largest Hessian eigenvalues"

    def plot(self) -> "Figure":
        """Draw how the eigenvalues of all batches are spread."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axis = figure.subplots()
        axis.hist(self.data["eigenvalue"].ravel(), bins=40)
        axis.set(xlabel="eigenvalue", ylabel="count")
        return figure


def hessian_eigenvalues(
    model: nn.Module,
    losses: Iterable[Loss],
    *,
    count: int = 1,
    weight_decay: float = 0.0,
    iterations: int = 500,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> HessianSpectrum:
    r"""Return the eigenvalues of largest size of the loss's Hessian, for every mini-batch, by power iteration.

    .. math:: v \leftarrow \frac{H v}{\lVert H v \rVert}, \qquad
        H = \nabla_w^2 \Big( L(w) + \frac{\lambda}{2} \lVert w \rVert^2 \Big)

    Those after the first come from vectors kept orthogonal to the ones before. Each batch gives a spectrum of its own,
    for a mean over batches would hide the few sharp or negative directions that training meets.

    Args:
        model: it is run in eval mode and comes back as it was.
        losses: of the model on one mini-batch each.
        count: eigenvalues a batch.
        weight_decay: :math:`\lambda`.
        iterations: at most so many a vector.
        tolerance: relative change of the eigenvalue at which a vector is done.
        seed: of the first vectors.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    random = generator(seed, "hessian")
    rows = []
    # Fused attention has no second derivative.
    with torch.enable_grad(), evaluating(model), sdpa_kernel(SDPBackend.MATH):
        for loss in losses:
            slopes = torch.autograd.grad(loss(model), parameters, create_graph=True, materialize_grads=True)
            slope = torch.cat([g.flatten() for g in slopes])

            def times(v: Tensor, slope: Tensor = slope) -> Tensor:
                products = torch.autograd.grad(
                    slope, parameters, v, retain_graph=True, materialize_grads=True
                )
                return torch.cat([g.flatten() for g in products]) + weight_decay * v

            found: list[Tensor] = []
            values: list[float] = []
            for _ in range(min(count, size)):
                start = torch.randn(size, generator=random).to(slope)
                vector, value = _power_iteration(times, start, found, iterations, tolerance)
                found.append(vector)
                values.append(value)
            rows.append(values)
    return HessianSpectrum({"eigenvalue": np.array(rows)})


def _power_iteration(
    times: Callable[[Tensor], Tensor],
    vector: Tensor,
    found: Sequence[Tensor],
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, float]:
    """Return a unit vector orthogonal to `found`, and its eigenvalue."""

    def cleaned(v: Tensor) -> Tensor:
        for other in found:
            v = v - (v @ other) * other
        return v / v.norm().clamp_min(1e-30)

    vector, value = cleaned(vector), 0.0
    for _ in range(iterations):
        product = times(vector).detach()
        previous, value = value, float(vector @ product)
        vector = cleaned(product)
        if abs(value - previous) <= tolerance * abs(value):
            break
    return vector, value


class Landscape(Artifact):
    """`data["loss"]` over the steps `data["step"]` (S,) along one or two directions, (S,) or (S, S)."""

    title = "Loss landscape"

    def plot(self) -> "Figure":
        """Draw a curve along one direction, or contours over two."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 4), layout="constrained")
        axis = figure.subplots()
        step, loss = self.data["step"], self.data["loss"]
        if loss.ndim == 1:
            axis.plot(step, loss)
            axis.set(xlabel="step", ylabel="loss")
        else:
            figure.colorbar(axis.contourf(step, step, np.log(np.maximum(loss, 1e-12)), 20), label="log loss")
        return figure


def filter_direction(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return a random direction whose every filter is as long as the model's; zero for biases and norms."""
    random = generator(seed, "direction")
    direction = {}
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=random).to(value)
        if value.ndim < 2:
            direction[name] = torch.zeros_like(value)
            continue
        length, own = (one.detach().flatten(1).norm(dim=1) for one in (value, noise))
        direction[name] = noise * (length / own.clamp_min(1e-12)).view(-1, *[1] * (value.ndim - 1))
    return direction


@torch.no_grad()
def loss_landscape(
    model: nn.Module,
    loss: Loss,
    *,
    directions: int = 2,
    span: float = 1.0,
    steps: int = 11,
    seed: int = 0,
) -> Landscape:
    r"""Return the loss on a slice through the model's weights along random filter-normalised directions.

    .. math:: L(w + \alpha d_1 + \beta d_2), \qquad d \leftarrow d\, \frac{\lVert w_\mathrm{filter} \rVert}
        {\lVert d_\mathrm{filter} \rVert}

    Args:
        model: it is run in eval mode and comes back as it was.
        loss: of the model.
        directions: 1 or 2.
        span: largest :math:`|\alpha|` and :math:`|\beta|`, in units of the filters' own lengths.
        steps: along each direction, odd ones going through the weights themselves.
        seed: of the directions.
    """
    if directions not in (1, 2):
        raise ValueError(f"directions must be 1 or 2: got {directions}")
    bases = [filter_direction(model, seed + index) for index in range(directions)]
    values = dict(model.named_parameters())
    step = torch.linspace(-span, span, steps, dtype=torch.float64)
    places = torch.cartesian_prod(*[step] * directions).view(-1, directions).tolist()

    class Moved(nn.Module):
        def forward(self, *inputs: Any) -> Any:
            return functional_call(model, weights, inputs)

    found = []
    with evaluating(model):
        for place in places:
            weights = {
                name: value + sum(along * base[name] for along, base in zip(place, bases, strict=True))
                for name, value in values.items()
            }
            found.append(float(loss(Moved())))
    return Landscape({"step": step.numpy(), "loss": np.array(found).reshape([steps] * directions)})
