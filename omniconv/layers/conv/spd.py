"""Space-to-depth convolution: downsampling that hands every pixel on, instead of a stride or a pool.

Paper: Sunkara and Luo, No More Strided Convolutions or Pooling, https://arxiv.org/abs/2208.03641. Channels after
space-to-depth are in the order of `torch.nn.functional.pixel_unshuffle`, c s^2 + row s + column; the authors' code puts
the sub-maps one after the other, (column s + row) C + c.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.layers.conv.convert import input_shapes

__all__ = ["SPDConv2d", "replace_strides"]

M = TypeVar("M", bound=nn.Module)


class SPDConv2d(nn.Conv2d):
    r"""Downsampling layer of `SPD-Conv <https://arxiv.org/abs/2208.03641>`_: space-to-depth, then a convolution.

    .. math:: y = W * \mathrm{S}(x), \qquad
              \mathrm{S}(x)_{c s^2 + r s + q,\, i,\, j} = x_{c,\, s i + r,\, s j + q}

    A size that s does not divide gets zeros at its end. The layer equals a convolution of stride s with a kernel of
    s k x s k, so no pixel is skipped and none is averaged away.

    Args:
        in_channels, out_channels: of input and output; the kernel sees :math:`s^2 C_\mathrm{in}` channels.
        kernel_size: k, odd.
        scale: s.
        groups: of channels before space-to-depth.
        bias: add a number to every output channel.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if `kernel_size` is even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        scale: int = 2,
        groups: int = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        super().__init__(
            in_channels * scale**2, out_channels, kernel_size,
            padding=kernel_size // 2, groups=groups, bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Rearrange and convolve `input`."""
        height, width = input.shape[2:]
        x = F.pad(input, (0, -width % self.scale, 0, -height % self.scale))
        return super().forward(F.pixel_unshuffle(x, self.scale))

    @classmethod
    def from_strided(cls, conv: nn.Conv2d) -> "SPDConv2d":
        """Return the layer that computes the same as a strided convolution, its kernel embedded between zeros.

        Raises:
            ValueError: if `conv` does not put out ceil(H / s) x ceil(W / s) pixels, or pads with other than zeros.
        """
        (k, high), (s, wide) = conv.kernel_size, conv.stride
        p = conv.padding[0]
        # Then floor((n + 2 p - k) / s) + 1 pixels are n / s where s divides n.
        halves = not isinstance(p, str) and -s <= 2 * p - k < 0
        if (k, s) != (high, wide) or set(conv.padding) != {p} or conv.dilation != (1, 1) or not halves:
            raise ValueError(
                "a strided convolution must be square, not dilated, and put out ceil(size / stride) pixels: "
                f"got kernel {conv.kernel_size}, stride {conv.stride}, padding {conv.padding}, "
                f"dilation {conv.dilation}"
            )
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros': got {conv.padding_mode!r}")
        assert isinstance(p, int)
        # Tap u reads pixel u - p of a window that starts at 0; blocks of s pixels reach that far to either side.
        reach = max(-(-p // s), (k - 1 - p) // s)
        before, size = reach * s - p, (2 * reach + 1) * s
        weight = F.pad(conv.weight.detach(), (before, size - k - before) * 2)
        layer = cls(
            conv.in_channels, conv.out_channels, 2 * reach + 1, scale=s, groups=conv.groups,
            bias=conv.bias is not None, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(F.pixel_unshuffle(weight, s))
            if conv.bias is not None and layer.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer.train(conv.training)


def _pixels(size: int | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _averaging(pool: nn.MaxPool2d | nn.AvgPool2d, channels: int, like: Tensor) -> nn.Conv2d:
    """Return the strided convolution that averages over the window of `pool`."""
    conv = nn.Conv2d(
        channels, channels, _pixels(pool.kernel_size), _pixels(pool.stride), _pixels(pool.padding),
        groups=channels, bias=False, device=like.device, dtype=like.dtype,
    )  # fmt: skip
    nn.init.constant_(conv.weight, 1 / conv.weight[0].numel())
    return conv


def replace_strides(model: M, images: Tensor) -> M:
    """Return a copy of a network in which space-to-depth convolutions stand for strided convolutions and pools.

    At sizes that the strides divide, a replaced convolution or average pool computes what it did before, and may
    learn from the pixels and taps that it could not see; a maximum pool starts as the average. Pools over the whole
    map, and those without a stride, stay.

    Args:
        model: the network; it is left as it is.
        images: a batch that it takes, from which the channels of its pools are read.

    Raises:
        ValueError: if a layer cannot be written so; the message names it.
    """
    shapes = input_shapes(model, images, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))
    model = copy.deepcopy(model)
    for name, shape in shapes.items():
        module = model.get_submodule(name)
        if max(_pixels(module.stride)) == 1:  # type: ignore[arg-type]
            continue
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            module = _averaging(module, shape[1], images)
        assert isinstance(module, nn.Conv2d)
        try:
            model.set_submodule(name, SPDConv2d.from_strided(module))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return model


CASES = (
    Case(
        SPDConv2d,
        {"in_channels": 3, "out_channels": 5},
        inputs=((2, 3, 7, 10),),
        output=(2, 5, 4, 5),
        minimal=(1, 3, 1, 1),
        raises=(
            Raises(
                ValueError,
                "kernel_size must be odd and positive: got 2",
                {"in_channels": 3, "out_channels": 5, "kernel_size": 2},
            ),
        ),
    ),
    Case(
        SPDConv2d,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 1, "scale": 3, "groups": 2, "bias": False},
        inputs=((2, 4, 8, 7),),
        output=(2, 6, 3, 3),
        id="groups",
        minimal=(1, 4, 1, 1),
    ),
)
