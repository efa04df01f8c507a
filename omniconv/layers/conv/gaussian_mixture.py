"""Convolution, ReLU and normalisation of fields that are mixtures of Gaussians.

Paper: Celarek et al., Gaussian Mixture Convolution Networks, https://arxiv.org/abs/2202.09153. What differs: the norm
scales by the sample's own integrals, so it needs no running averages. For the operators and the packing of mixtures
see `omniconv.ops.gaussian_mixture`.
"""

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises
from omniconv.ops.gaussian_mixture import convolve, fit_relu, integrate, pack, tree_hem, unpack, volume

__all__ = ["GaussianMixtureConv", "GaussianMixtureNorm", "GaussianMixtureReLU"]


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class GaussianMixtureConv(nn.Module):
    r"""Convolution of mixtures with learned mixtures, as in `GMCN <https://arxiv.org/abs/2202.09153>`_.

    .. math:: y_{n,o} = \sum_f m_{n,f} * k_{o,f}

    Exact and without a grid: every component of the data meets every component of the kernel. Kernels' covariances
    are :math:`A A^\top + \epsilon I`; their weights are learned as integrals, which covariances do not change.

    Args:
        in_channels: F.
        out_channels: O.
        dim: d, the dimensions of space.
        kernel_components: L, Gaussians in a kernel.
        radius: how far from the centre the kernels' Gaussians start; their deviation starts at half of it.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, F, K, 1 + d + d^2)`
        - output: :math:`(N, O, F K L, 1 + d + d^2)`

    Raises:
        ValueError: if `kernel_components` is not positive, or the input is not of F channels in d dimensions.
    """

    EPSILON = 0.05

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dim: int = 2,
        kernel_components: int = 5,
        radius: float = 2.0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kernel_components < 1:
            raise ValueError(f"kernel_components must be positive: got {kernel_components}")
        self.radius = radius
        shape = (out_channels, in_channels, kernel_components)
        self.weights = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.positions = nn.Parameter(torch.empty(*shape, dim, device=device, dtype=dtype))
        self.factors = nn.Parameter(torch.empty(*shape, dim * dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw kernels of round Gaussians around their centre, whose outputs are about as large as their inputs."""
        fan = self.weights.shape[1] * self.weights.shape[2]
        dim, deviation = self.positions.shape[-1], self.radius / 2
        nn.init.normal_(self.weights, std=fan**-0.5)
        nn.init.uniform_(self.positions, -self.radius, self.radius)
        with torch.no_grad():
            self.factors.copy_(deviation * torch.eye(dim).flatten())

    def kernels(self) -> Tensor:
        """Return the kernels as mixtures (O, F, L, 1 + d + d d)."""
        dim = self.positions.shape[-1]
        factors = _at_least_float32(self.factors).unflatten(-1, (dim, dim))
        covariances = (factors[..., None, :] * factors[..., None, :, :]).sum(-1)
        ridge = self.EPSILON * torch.eye(dim).to(factors)
        covariances = covariances + ridge
        heights = self.weights.to(factors) / volume(covariances)
        return pack(heights, self.positions.to(factors), covariances)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the mixtures `x`."""
        return convolve(_at_least_float32(x), self.kernels()).to(x.dtype)


class GaussianMixtureReLU(nn.Module):
    r"""Bias, ReLU and pooling of mixtures: a fit of :math:`\max(0, m + c) - \max(0, c)` by fewer Gaussians.

    Of `GMCN <https://arxiv.org/abs/2202.09153>`_: first the weights are fitted, then TreeHEM reduces the components.

    Args:
        channels: F.
        components: P, Gaussians that remain; None keeps all.
        device, dtype: of the bias c, one number a channel.

    Shapes:
        - input: :math:`(N, F, K, 1 + d + d^2)`
        - output: :math:`(N, F, P, 1 + d + d^2)`; fewer if K is less

    Raises:
        ValueError: if `components` is not positive.
    """

    def __init__(self, channels: int, components: int | None = None, *, device=None, dtype=None) -> None:
        super().__init__()
        if components is not None and components < 1:
            raise ValueError(f"components must be positive: got {components}")
        self.components = components
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the bias to zero."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Rectify the mixtures `x`."""
        # The fit divides small differences: they should not depend on strides.
        mixture = _at_least_float32(x).contiguous()
        # Differences of positions are too fine for bfloat16. There is no autocast on the meta device.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            fitted = fit_relu(mixture, self.bias.to(mixture))
            return (fitted if self.components is None else tree_hem(fitted, self.components)).to(x.dtype)


class GaussianMixtureNorm(nn.Module):
    r"""Scale the weights of every sample so that its channels' components integrate to one on average, times a gain.

    .. math:: a'_{f,i} = g_f\, a_{f,i} \Big/ \Big(\frac{1}{F} \sum_{f,i}
        |a_{f,i}| \sqrt{(2 \pi)^d |C_{f,i}|} + \epsilon\Big)

    Of `GMCN <https://arxiv.org/abs/2202.09153>`_, whose norm scales weights too, by averages over the batch.

    Args:
        channels: F.
        gain: where all g start.
        device, dtype: of the gain.

    Shapes:
        - input and output: :math:`(N, F, K, 1 + d + d^2)`
    """

    EPSILON = 1e-3

    def __init__(self, channels: int, gain: float = 1.0, *, device=None, dtype=None) -> None:
        super().__init__()
        self.start = gain
        self.gain = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all gains to where they start."""
        nn.init.constant_(self.gain, self.start)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the mixtures `x`."""
        weights, positions, covariances = unpack(_at_least_float32(x))
        total = integrate(pack(weights.abs(), positions, covariances)).mean(1)[:, None, None]
        scaled = self.gain.to(weights)[:, None] * weights / (total + self.EPSILON)
        return pack(scaled, positions, covariances).to(x.dtype)


CASES = (
    Case(
        GaussianMixtureConv,
        {"in_channels": 3, "out_channels": 2, "kernel_components": 2},
        inputs=((2, 3, 5, 7),),
        output=(2, 2, 30, 7),
        vary=(0, 2),
        channels_last=False,
        raises=(
            Raises(ValueError, "kernel_components must be positive: got 0", {"kernel_components": 0}),
            Raises(ValueError, "a component needs 1 + d + d * d numbers: got 6", inputs=((2, 3, 5, 6),)),
            Raises(
                ValueError,
                "mixture (N, F, K, M) and kernels (O, F, L, M) must agree in F and M: "
                "got (2, 4, 5, 7) and (2, 3, 2, 7)",
                inputs=((2, 4, 5, 7),),
            ),
        ),
    ),
    Case(
        GaussianMixtureConv,
        {"in_channels": 1, "out_channels": 2, "dim": 3, "kernel_components": 1},
        inputs=((2, 1, 3, 13),),
        output=(2, 2, 3, 13),
        id="3d",
        vary=(0, 2),
        channels_last=False,
    ),
    Case(
        GaussianMixtureReLU,
        {"channels": 3, "components": 4},
        inputs=((2, 3, 11, 7),),
        output=(2, 3, 4, 7),
        vary=(0,),
        channels_last=False,
        raises=(Raises(ValueError, "components must be positive: got 0", {"components": 0}),),
    ),
    Case(
        GaussianMixtureReLU,
        {"channels": 3},
        inputs=((2, 3, 5, 13),),
        output=(2, 3, 5, 13),
        id="3d-all",
        vary=(0, 2),
        channels_last=False,
    ),
    Case(
        GaussianMixtureNorm,
        {"channels": 3},
        inputs=((2, 3, 5, 7),),
        output=(2, 3, 5, 7),
        vary=(0, 2),
        channels_last=False,
    ),
)
