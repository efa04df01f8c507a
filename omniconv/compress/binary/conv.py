"""Convolutions whose weights and inputs are signs, trained through latent real weights.

`Courbariaux et al. <https://arxiv.org/abs/1602.02830>`_ and `XNOR-Net <https://arxiv.org/abs/1603.05279>`_ without its
scales, which a norm after the convolution takes over.
"""

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from omniconv.compress.report import CompressionReport, compare
from omniconv.core.config import closest

__all__ = ["BinaryConv2d", "binarize", "sign"]

M = TypeVar("M", bound=nn.Module)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0].masked_fill(x.abs() > 1, 0)


def sign(x: Tensor) -> Tensor:
    """Return 1 where x is not negative and -1 elsewhere; gradients pass straight through where |x| is at most 1."""
    return _StraightThrough.apply(x)  # pyright: ignore[reportReturnType]


class BinaryConv2d(nn.Conv2d):
    r"""Convolution of the signs of its input with the signs of its weights (`BNN <https://arxiv.org/abs/1602.02830>`_).

    .. math:: y_o = b_o + \sum_c \mathrm{sign}(w_{oc}) * \mathrm{sign}(x_c)

    Takes the arguments of :class:`torch.nn.Conv2d`. Zeros of the padding stay zeros. A norm should follow, as outputs
    are as large as the number of weights.

    Args:
        binary_input: take the sign of the input; if not, only weights are binary.

    Shapes:
        - as :class:`torch.nn.Conv2d`
    """

    def __init__(self, *args: Any, binary_input: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.binary_input = binary_input

    def forward(self, input: Tensor) -> Tensor:
        """Convolve signs."""
        return self._conv_forward(sign(input) if self.binary_input else input, sign(self.weight), self.bias)


def binarize(
    model: M, *, layers: Sequence[str] | None = None, binary_input: bool = True
) -> tuple[M, CompressionReport]:
    """Make convolutions binary, to be trained then; their weights become the latent ones.

    Args:
        model: any module; it stays as it is.
        layers: names of the 2-d convolutions; by default all but the first one.
        binary_input: binarize their inputs too.

    Raises:
        ValueError: if `layers` names none.
    """
    result: Any = copy.deepcopy(model)
    found = {name: m for name, m in result.named_modules() if isinstance(m, nn.Conv2d)}
    for name in layers or ():
        if name not in found:
            raise ValueError(f"layers: {name!r} is no 2-d convolution{closest(name, list(found))}")
    for name in list(found)[1:] if layers is None else layers:
        conv = found[name]
        binary = BinaryConv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, binary_input=binary_input, device="meta",
        ).train(conv.training)  # fmt: skip
        binary.weight, binary.bias = conv.weight, conv.bias
        if name:
            result.set_submodule(name, binary)
        else:
            result = binary
    note = "Latent weights stay real while the model is trained; mst_compress stores their signs."
    return result, compare("binarization", model, result, notes=(note,))
