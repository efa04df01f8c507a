"""Squeeze-and-excitation: every channel is scaled by a gate that sees all channels' means.

Paper: Hu et al., Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507. The two fully connected
layers are written as 1x1 convolutions, as in the public weights.
"""

from torch import Tensor, nn

from omniconv.core.cases import Case, Raises

__all__ = ["SqueezeExcite"]


class SqueezeExcite(nn.Module):
    r"""Channel gate of `Squeeze-and-Excitation Networks <https://arxiv.org/abs/1709.01507>`_.

    .. math:: y = x \cdot \sigma\bigl(W_2\, \delta(W_1\, z + b_1) + b_2\bigr), \qquad
              z_c = \frac{1}{HW} \sum_{h,w} x_{chw}

    Args:
        channels: channels C of the input.
        reduced: width of the bottleneck, C / r in the paper (r = 16); `None` takes C / 16 rounded to a
            multiple of 8, and at least 8, as the public weights do.
        act: the activation :math:`\delta`.
        gate: the function :math:`\sigma` that maps to the scale of a channel.
        names: what the two layers are called in the state dict, which public weights do not agree about:
            ("fc1", "fc2") in residual networks, ("conv_reduce", "conv_expand") in MobileNets.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `channels` or `reduced` is not positive.
    """

    def __init__(
        self,
        channels: int,
        reduced: int | None = None,
        *,
        act: type[nn.Module] = nn.ReLU,
        gate: type[nn.Module] = nn.Sigmoid,
        names: tuple[str, str] = ("fc1", "fc2"),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if reduced is None:
            reduced = max(8, (channels // 16 + 4) // 8 * 8)
        if channels < 1 or reduced < 1:
            raise ValueError(f"channels and reduced must be positive: got {channels} and {reduced}")
        self.names = names
        self.add_module(names[0], nn.Conv2d(channels, reduced, 1, device=device, dtype=dtype))
        self.act = act()
        self.add_module(names[1], nn.Conv2d(reduced, channels, 1, device=device, dtype=dtype))
        self.gate = gate()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for name in self.names:
            getattr(self, name).reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel of `x` by its gate."""
        reduce, expand = (getattr(self, name) for name in self.names)
        z = x.mean((2, 3), keepdim=True)
        return x * self.gate(expand(self.act(reduce(z))))


CASES = (
    Case(
        SqueezeExcite,
        {"channels": 12, "reduced": 3},
        inputs=((2, 12, 7, 5),),
        output=(2, 12, 7, 5),
        minimal=(1, 12, 1, 1),
        raises=(
            Raises(
                ValueError,
                "channels and reduced must be positive: got 8 and 0",
                {"channels": 8, "reduced": 0},
            ),
        ),
    ),
)
