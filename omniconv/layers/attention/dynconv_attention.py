"""Self-attention as two dynamic 1x1 convolutions, and what that view allows.

Paper: Zhou et al., Interpret Vision Transformers as ConvNets with Dynamic Convolutions,
https://arxiv.org/abs/2309.10713. Keys and values are kernels that the input generates; softmax is the activation
between two convolutions and may become what convolutional networks have there; the second convolution may become a
depthwise one. `omniconv.inspect.mixing` tells from its derivatives alone what kind of convolution a layer is.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["DepthwiseDynamicConv2d", "DynamicConvAttention", "dynamic_pointwise"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: torch.softmax(scores, -2),
    "relu": F.relu,
    "gelu": F.gelu,
    "none": lambda scores: scores,
}


def dynamic_pointwise(x: Tensor, kernel: Tensor) -> Tensor:
    r"""Return the 1x1 convolution of every map with a kernel of its own.

    .. math:: y_{nol} = \sum_c w_{noc} x_{ncl}

    Shapes:
        - x: :math:`(*, C, L)`
        - kernel: :math:`(*, O, C)`
        - output: :math:`(*, O, L)`
    """
    return kernel @ x


class DynamicConvAttention(nn.Module):
    r"""Multi-head attention in the form of `two dynamic convolutions <https://arxiv.org/abs/2309.10713>`_.

    .. math:: y = W_O\, \mathrm{concat}_h\Big(V_h *_{1 \times 1}
        \mathrm{norm}\big(\varphi\big(d^{-1/2} K_h^\top *_{1 \times 1} Q_h\big)\big)\Big)

    The first kernel makes L channels of d, one for every token; activation :math:`\varphi` and norm act on these, at
    every place; the second kernel makes d of them. With softmax and no norm this is self-attention, with the same
    parameters.

    Args:
        dim: features C of a token.
        num_heads: heads; must divide `dim`.
        activation: :math:`\varphi`.
        norm: over the L channels of a place ("layer"), over all of a head's ("batch"), or none.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, L, C)`

    Raises:
        ValueError: if `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        activation: Literal["softmax", "relu", "gelu", "none"] = "softmax",
        norm: Literal["layer", "batch", "none"] = "none",
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads: got {dim} and {num_heads}")
        self.num_heads, self.activation = num_heads, activation
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.layer_norm = norm == "layer"
        self.norm = (
            nn.BatchNorm2d(num_heads, device=device, dtype=dtype) if norm == "batch" else nn.Identity()
        )
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for layer in (self.qkv, self.norm, self.proj):
            if not isinstance(layer, nn.Identity):
                layer.reset_parameters()

    def maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values as maps (N, heads, d, L) of tokens (N, L, C)."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 4, 1).unbind(0)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Mix the tokens of `x` as `source`, or else `x` itself, says."""
        q, k, v = self.maps(x)
        if source is not None:
            q, k, _ = self.maps(source)
        scores = dynamic_pointwise(q, k.mT) * q.shape[2] ** -0.5
        mix = self.norm(_ACTIVATIONS[self.activation](scores))
        if self.layer_norm:
            mix = F.layer_norm(mix.mT, mix.shape[2:3]).mT
        return self.proj(dynamic_pointwise(mix, v).flatten(1, 2).mT)

    def extra_repr(self) -> str:
        """Show activation and norm."""
        return f"activation={self.activation}, layer_norm={self.layer_norm}"


class DepthwiseDynamicConv2d(nn.Module):
    r"""Token mixer of a depthwise vision transformer: one dynamic kernel a channel, the same at every place.

    .. math:: y = W_O\,\big(\mathrm{softmax}(\mathrm{pool}_{K \times K}(W_K x)) *_\mathrm{depthwise} W_V x\big)

    The keys, averaged to :math:`K \times K` cells, are the kernel, so that its weights add up to one. A map of L tokens
    takes :math:`K^2 L C` multiply-adds beside the three linear maps, where attention takes :math:`2 L^2 C`.

    Args:
        dim: channels C.
        kernel_size: K, odd.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `kernel_size` is even or not positive.
    """

    def __init__(self, dim: int, kernel_size: int = 7, *, device=None, dtype=None) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        self.kernel_size = kernel_size
        self.key = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)
        self.value = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)
        self.proj = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for layer in (self.key, self.value, self.proj):
            layer.reset_parameters()

    def kernels(self, x: Tensor) -> Tensor:
        """Return the kernels (N, C, K, K) that `x` asks for."""
        cells = F.adaptive_avg_pool2d(self.key(x), self.kernel_size)
        return cells.flatten(2).softmax(-1).view_as(cells)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Mix the pixels of `x` as `source`, or else `x` itself, says."""
        kernels = self.kernels(x if source is None else source).flatten(0, 1)[:, None]
        v = self.value(x)
        mixed = F.conv2d(
            v.reshape(1, -1, *v.shape[2:]), kernels, padding=self.kernel_size // 2, groups=kernels.shape[0]
        )
        return self.proj(mixed.view_as(v))


CASES = (
    Case(
        DynamicConvAttention,
        {"dim": 12, "num_heads": 3},
        inputs=((2, 7, 12),),
        output=(2, 7, 12),
        vary=(0, 1),
        minimal=(1, 1, 12),
        raises=(Raises(ValueError, "dim must be divisible by num_heads: got 12 and 5", {"num_heads": 5}),),
    ),
    Case(
        DynamicConvAttention,
        {"dim": 8, "num_heads": 2, "activation": "relu", "norm": "layer"},
        inputs=((2, 7, 8),),
        output=(2, 7, 8),
        id="relu-layer-norm",
        vary=(0, 1),
        minimal=(1, 1, 8),
    ),
    Case(
        DynamicConvAttention,
        {"dim": 8, "num_heads": 2, "activation": "gelu", "norm": "batch"},
        inputs=((2, 7, 8),),
        output=(2, 7, 8),
        id="gelu-batch-norm",
        vary=(0, 1),
    ),
    Case(
        DepthwiseDynamicConv2d,
        {"dim": 6, "kernel_size": 3},
        inputs=((2, 6, 7, 5),),
        output=(2, 6, 7, 5),
        minimal=(1, 6, 1, 1),
        channels_last=False,
        raises=(Raises(ValueError, "kernel_size must be odd and positive: got 4", {"kernel_size": 4}),),
    ),
)
