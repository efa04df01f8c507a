"""SMPConv: a continuous kernel made of points that move freely, each a weighted bump with a radius of its own.

Paper: Kim and Park, SMPConv, https://arxiv.org/abs/2304.02330. No network makes the kernel, and the number of
parameters does not depend on its size. One implementation serves any number of axes, images and causal sequences.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises
from omniconv.layers.conv.reparam import fuse_conv_bn
from omniconv.ops.depthwise_conv.api import depthwise_conv
from omniconv.ops.long_conv.api import long_conv

__all__ = ["RepSMPConv2d", "SMPConv1d", "SMPConv2d", "SMPConv3d", "smp_parameter_groups"]


class _SMPConv(nn.Module):
    axes: ClassVar[int]

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        points: int | None = None,
        *,
        causal: bool = False,
        average: bool = False,
        std: float = 0.2,
        radius: float | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kernel_size < 2 or (kernel_size % 2 == 0 and not causal):
            raise ValueError(f"kernel_size must be odd and at least 3, or causal=True: got {kernel_size}")
        points = max(1, kernel_size**self.axes // 4) if points is None else points
        if points < 1:
            raise ValueError(f"points must be positive: got {points}")
        self.kernel_size = kernel_size
        self.causal = causal
        self.average = average
        self.std = std
        self.first_radius = 4 / kernel_size if radius is None else radius
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.position = nn.Parameter(torch.empty(points, self.axes, **options))
        self.radius = nn.Parameter(torch.empty(points, **options))
        self.weight = nn.Parameter(torch.empty(channels, points, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scatter the points anew, around the middle or, if causal, from the present backwards."""
        nn.init.trunc_normal_(self.position, std=self.std, a=-1.0, b=1.0)
        if self.causal:
            with torch.no_grad():
                self.position.abs_().mul_(2).sub_(1)
        nn.init.constant_(self.radius, self.first_radius)
        nn.init.trunc_normal_(self.weight, std=0.02)

    def kernel(self, size: int | None = None) -> Tensor:
        """Return the kernel (C, *K) at `size` nodes from -1 to 1 along every axis, `kernel_size` by default."""
        size = self.kernel_size if size is None else size
        # Half precision cannot tell the nodes of a long grid apart.
        wide = torch.promote_types(self.position.dtype, torch.float32)
        position, radius = self.position.to(wide), self.radius.to(wide).clamp(1e-3, 1.0)
        # This quotient is the same number wherever grids of different sizes share a node; linspace is not.
        nodes = torch.arange(1 - size, size, 2, device=position.device, dtype=wide) / (size - 1)
        distance = position.new_zeros(())
        for axis in range(self.axes):
            gaps = (position[:, axis, None] - nodes).abs()
            distance = distance + gaps.reshape(-1, *(size if a == axis else 1 for a in range(self.axes)))
        bumps = torch.relu(1 - distance.flatten(1) / radius[:, None])
        if self.average:
            bumps = bumps / ((bumps > 0).sum(0) + 1e-6)
        kernel = self.weight @ bumps.to(self.weight.dtype)
        return kernel.reshape(-1, *(size for _ in range(self.axes)))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every channel with its kernel."""
        if self.causal:
            return long_conv(x, self.kernel())
        return depthwise_conv(x, self.kernel()[:, None], padding=self.kernel_size // 2)


class SMPConv1d(_SMPConv):
    """`SMPConv2d` of sequences :math:`(N, C, L)`; `causal=True` with a `kernel_size` of L sees all that has been."""

    axes = 1


class SMPConv2d(_SMPConv):
    r"""Depthwise convolution with a kernel of `self-moving points <https://arxiv.org/abs/2304.02330>`_.

    .. math:: y = k * x, \qquad k_c(u) = \sum_{i=1}^{n} w_{ci} \max\Bigl(0,\ 1 - \frac{\|u - p_i\|_1}{r_i}\Bigr)

    with the kernel's nodes u on a grid from -1 to 1 along every axis. All channels share positions :math:`p_i` and
    radii :math:`r_i`, which are kept between 0.001 and 1, so that there are :math:`n (C + d + 1)` parameters for d
    axes whatever the kernel's size. `smp_parameter_groups` gives radii the lower learning rate that they need.

    Args:
        channels: channels C.
        kernel_size: nodes along every axis; odd unless causal.
        points: n; a quarter of the kernel's nodes by default.
        causal: let node -1 be the present and the others the past; the points begin near the present.
        average: divide each node by the number of points that reach it, as the paper does for sequences.
        std: of the normal distribution of which positions are drawn; the paper's is 0.2 for images, 0.1 for sequences.
        radius: first value of all radii; 4 / `kernel_size`, about two nodes, by default.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `kernel_size` is even and not causal, or a size is too small.
    """

    axes = 2


class SMPConv3d(_SMPConv):
    """`SMPConv2d` of volumes :math:`(N, C, D, H, W)`."""

    axes = 3


class RepSMPConv2d(nn.Module):
    r"""SMPConv beside a small kernel, as in the ImageNet networks of the `paper <https://arxiv.org/abs/2304.02330>`_.

    .. math:: y = \mathrm{BN}_1(\mathrm{SMPConv}(x)) + \mathrm{BN}_2(w * x)

    `merged` returns the one convolution that this is in eval mode.

    Args:
        channels: channels C.
        kernel_size: of the SMPConv, odd.
        small: size of w, odd and at most `kernel_size`.
        points: of the SMPConv.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if a size does not fit.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 31,
        small: int = 5,
        points: int | None = None,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if small % 2 == 0 or small > kernel_size:
            raise ValueError(f"small must be odd and at most kernel_size {kernel_size}: got {small}")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.smp = SMPConv2d(channels, kernel_size, points, **options)
        self.smp_norm = nn.BatchNorm2d(channels, **options)
        self.small = nn.Parameter(torch.empty(channels, 1, small, small, **options))
        self.small_norm = nn.BatchNorm2d(channels, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights and forget the running statistics."""
        for module in (self.smp, self.smp_norm, self.small_norm):
            module.reset_parameters()
        nn.init.trunc_normal_(self.small, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both branches."""
        small = depthwise_conv(x, self.small, padding=self.small.shape[-1] // 2)
        return self.smp_norm(self.smp(x)) + self.small_norm(small)

    def merged(self) -> nn.Conv2d:
        """Return the depthwise convolution with bias that equals this layer in eval mode."""
        large, bias = fuse_conv_bn(self.smp.kernel()[:, None], None, self.smp_norm)
        small, shift = fuse_conv_bn(self.small, None, self.small_norm)
        channels, _, size, _ = large.shape
        margin = (size - small.shape[-1]) // 2
        conv = nn.Conv2d(
            channels, channels, size, padding=size // 2, groups=channels, device=large.device, dtype=large.dtype
        )  # fmt: skip
        conv.weight = nn.Parameter((large + nn.functional.pad(small, (margin,) * 4)).detach())
        conv.bias = nn.Parameter((bias + shift).detach())
        return conv


def smp_parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, radius_factor: float = 0.1
) -> list[dict[str, Any]]:
    """Return groups for an optimizer: radii learn `radius_factor` times as fast, points have no weight decay.

    Args:
        model: any network with SMPConv layers.
        lr: learning rate of all but radii.
        weight_decay: of all but radii and positions.
        radius_factor: how much slower radii learn.
    """
    layers = [module for module in model.modules() if isinstance(module, _SMPConv)]
    radii, positions = [m.radius for m in layers], [m.position for m in layers]
    apart = {id(p) for p in radii + positions}
    others = [p for p in model.parameters() if id(p) not in apart]
    return [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": positions, "lr": lr, "weight_decay": 0.0},
        {"params": radii, "lr": radius_factor * lr, "weight_decay": 0.0},
    ]


CASES = (
    Case(
        SMPConv1d,
        {"channels": 3, "kernel_size": 12, "points": 5, "causal": True, "average": True},
        inputs=((2, 3, 17),),
        output=(2, 3, 17),
        id="causal",
        vary=(0, 2),
        minimal=(1, 3, 1),
        raises=(
            Raises(ValueError, "points must be positive: got 0", {"points": 0}),
            Raises(
                ValueError,
                "kernel_size must be odd and at least 3, or causal=True: got 12",
                {"causal": False},
            ),
        ),
    ),
    Case(
        SMPConv2d,
        {"channels": 6, "kernel_size": 9, "radius": 0.4},
        inputs=((2, 6, 9, 7),),
        output=(2, 6, 9, 7),
        minimal=(1, 6, 1, 1),
    ),
    Case(
        SMPConv3d,
        {"channels": 2, "kernel_size": 3, "std": 0.5},
        inputs=((3, 2, 5, 4, 7),),
        output=(3, 2, 5, 4, 7),
        vary=(0, 2, 3, 4),
        minimal=(1, 2, 1, 1, 1),
    ),
    Case(
        RepSMPConv2d,
        {"channels": 6, "kernel_size": 9, "small": 3},
        inputs=((2, 6, 9, 7),),
        output=(2, 6, 9, 7),
        minimal=(2, 6, 1, 1),
        raises=(Raises(ValueError, "small must be odd and at most kernel_size 9: got 4", {"small": 4}),),
    ),
)
