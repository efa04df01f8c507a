"""TVConv: depthwise convolution whose kernel depends on the place, not on the picture.

Paper: Chen et al., TVConv, https://arxiv.org/abs/2203.10489. A small network makes the kernels of all places from
learned affinity maps; after training its output is kept and it is dropped. Parameter names are those of the authors'
code.
"""

import copy
import itertools
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.layers.conv.convert import input_shapes

__all__ = ["PositionConv2d", "TVConv2d", "translation_variant"]

M = TypeVar("M", bound=nn.Module)


class _PositionConv(nn.Module):
    """What a layer of one image size knows, and the convolution with a kernel for every place."""

    def __init__(self, size: tuple[int, int], kernel_size: int, stride: int) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        self.size = (size[0], size[1])
        self.kernel_size, self.stride = kernel_size, stride
        self.output_size = (-(-size[0] // stride), -(-size[1] // stride))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with kernels (C, k^2, H', W')."""
        if x.shape[2:] != self.size:
            raise ValueError(
                f"the layer is made for {self.size[0]} x {self.size[1]} pixels: got {tuple(x.shape[2:])}"
            )
        reach = self.kernel_size // 2
        x = F.pad(x, (reach,) * 4)
        # Tap by tap on shifted views, which needs no copy of all windows.
        taps = [
            x[:, :, u : u + self.size[0] : self.stride, v : v + self.size[1] : self.stride]
            for u in range(self.kernel_size)
            for v in range(self.kernel_size)
        ]
        y = taps[0] * weight[:, 0]
        for tap in range(1, len(taps)):
            y = torch.addcmul(y, weight[:, tap], taps[tap])
        return y if bias is None else y + bias


class PositionConv2d(_PositionConv):
    r"""Depthwise convolution with a kernel for every place, which is what a trained `TVConv2d` becomes.

    .. math:: y_{n,c,i,j} = b_{c,i,j} + \sum_{u,v} w_{c,\,u k + v,\,i,\,j}\; x_{n,\,c,\,s i + u - p,\,s j + v - p},
              \qquad p = \lfloor k / 2 \rfloor

    Args:
        channels: C.
        size: pixels (H, W) of the input.
        kernel_size: k, odd.
        stride: s.
        bias: add a number of its own to every channel and place.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, C, \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if `kernel_size` is even, or the input has another size.
    """

    def __init__(
        self, channels: int, size: tuple[int, int], kernel_size: int = 3, *, stride: int = 1, bias: bool = False,
        device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__(size, kernel_size, stride)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(channels, kernel_size**2, *self.output_size, **factory))
        self.bias = nn.Parameter(torch.empty(channels, *self.output_size, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every kernel as torch draws those of a depthwise convolution."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / self.kernel_size, 1 / self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`."""
        return self.convolve(x, self.weight, self.bias)


class TVConv2d(_PositionConv):
    r"""Translation-variant depthwise convolution of `TVConv <https://arxiv.org/abs/2203.10489>`_.

    .. math:: y_{n,c,i,j} = \sum_{u,v} G(A)_{c,\,u k + v,\,i,\,j}\; x_{n,\,c,\,s i + u - p,\,s j + v - p}

    with affinity maps A of a few channels, which start as ones, and a generator G of 3x3 convolutions, each followed by
    layer norm over the whole map and a ReLU but for the last. `reparameterize` keeps G(A) and drops both.

    Args:
        channels: C.
        size: pixels (H, W) of the input.
        kernel_size: k, odd.
        stride: s.
        affinity: channels of A.
        hidden: channels inside G (the paper takes 16 for faces, 64 for segmentation).
        layers: hidden layers of G after its first (1 for faces, 3 for segmentation).
        bias: add the maps of a second generator.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, C, \lceil H / s \rceil, \lceil W / s \rceil)`

    Raises:
        ValueError: if `kernel_size` is even, or the input has another size.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        kernel_size: int = 3,
        *,
        stride: int = 1,
        affinity: int = 4,
        hidden: int = 16,
        layers: int = 1,
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(size, kernel_size, stride)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def generator(out: int) -> nn.Sequential:
            widths = (affinity, *(hidden,) * (1 + layers))
            blocks: list[nn.Module] = []
            for width, following in itertools.pairwise(widths):
                blocks += [
                    nn.Conv2d(width, following, 3, padding=1, bias=False, **factory),
                    nn.LayerNorm([following, *self.output_size], **factory),
                    nn.ReLU(inplace=True),
                ]
            return nn.Sequential(*blocks, nn.Conv2d(hidden, out, 3, padding=1, bias=False, **factory))

        self.posi_map = nn.Parameter(torch.ones(1, affinity, *self.output_size, **factory))
        self.weight_layers = generator(channels * kernel_size**2)
        self.bias_layers = generator(channels) if bias else None

    def reset_parameters(self) -> None:
        """Draw new weights, and set the affinity maps to one."""
        nn.init.ones_(self.posi_map)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.LayerNorm):
                module.reset_parameters()

    def maps(self) -> tuple[Tensor, Tensor | None]:
        """Return the kernels (C, k^2, H', W') and biases (C, H', W') of all places."""
        weight = self.weight_layers(self.posi_map)[0].unflatten(0, (-1, self.kernel_size**2))
        return weight, None if self.bias_layers is None else self.bias_layers(self.posi_map)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Make the kernels and convolve `x`."""
        return self.convolve(x, *self.maps())

    @torch.no_grad()
    def merged(self) -> PositionConv2d:
        """Return the layer that keeps the kernels and computes the same."""
        weight, bias = self.maps()
        with torch.device("meta"):
            layer = PositionConv2d(len(weight), self.size, self.kernel_size, stride=self.stride)
        layer.weight = nn.Parameter(weight)
        layer.bias = None if bias is None else nn.Parameter(bias)
        return layer.train(self.training)


def translation_variant(model: M, images: Tensor, *, hidden: int = 16, layers: int = 1) -> M:
    """Return a copy of a network whose depthwise convolutions are `TVConv2d`, for images of one size.

    Depthwise convolutions that are not square, of odd size, padded by half of it and free of dilation stay as they are.

    Args:
        model: the network, such as a MobileNetV2; it is left as it is.
        images: a batch of the size that it will see.
        hidden: as in `TVConv2d`.
        layers: as in `TVConv2d`.
    """
    shapes = input_shapes(model, images, (nn.Conv2d,))
    model = copy.deepcopy(model)
    for name, shape in shapes.items():
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        (k, high), (s, wide) = conv.kernel_size, conv.stride
        square = k == high and s == wide and conv.dilation == (1, 1)
        centred = k % 2 == 1 and conv.padding == (k // 2, k // 2)
        if not (conv.groups == conv.in_channels == conv.out_channels > 1 and square and centred):
            continue
        layer = TVConv2d(
            conv.in_channels, (shape[2], shape[3]), k, stride=s, hidden=hidden, layers=layers,
            bias=conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
        model.set_submodule(name, layer.train(conv.training))
    return model


CASES = (
    Case(
        PositionConv2d,
        {"channels": 3, "size": (7, 5), "stride": 2, "bias": True},
        inputs=((2, 3, 7, 5),),
        output=(2, 3, 4, 3),
        vary=(0,),
    ),
    Case(
        TVConv2d,
        {"channels": 3, "size": (7, 5), "affinity": 2, "hidden": 4},
        inputs=((2, 3, 7, 5),),
        output=(2, 3, 7, 5),
        vary=(0,),
        raises=(
            Raises(
                ValueError,
                "kernel_size must be odd and positive: got 2",
                {"channels": 3, "size": (7, 5), "kernel_size": 2},
            ),
            Raises(ValueError, "the layer is made for 7 x 5 pixels: got (8, 5)", inputs=((2, 3, 8, 5),)),
        ),
    ),
    Case(
        TVConv2d,
        {
            "channels": 3,
            "size": (8, 7),
            "kernel_size": 5,
            "stride": 2,
            "hidden": 4,
            "layers": 0,
            "bias": True,
        },
        inputs=((2, 3, 8, 7),),
        output=(2, 3, 4, 4),
        id="stride",
        vary=(0,),
    ),
)
