"""MetaMixer: what softmax attention and the feed-forward network have in common, and what can be put into it.

Paper: Yun et al., MetaMixer Is All You Need, https://arxiv.org/abs/2406.02021. Both compare a query with keys, activate
the similarities and sum values by them. Attention computes keys and values from the input; the feed-forward network
learns them; "FFNified" attention is the second kind over space, with depthwise convolutions for keys and values.
"""

from typing import Any

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises
from omniconv.layers.conv.conv_norm import ConvNorm2d
from omniconv.layers.conv.rep_depthwise import RepDepthwiseConv2d

__all__ = ["FFNifiedAttention", "MetaMixer"]


class MetaMixer(nn.Module):
    r"""Frame of `MetaMixer <https://arxiv.org/abs/2406.02021>`_: query, keys, activation and values are free.

    .. math:: y = V(\phi(K(Q(x))))

    Args:
        query: Q.
        keys: K, gives the query's similarity to every key.
        activation: :math:`\phi`.
        values: V, sums the values by the activated similarities.
        dynamic: keys and values depend on x, which K and V then get as their second input.

    Shapes:
        - input and output: :math:`(N, C, *)`, as the parts have it
    """

    def __init__(
        self,
        query: nn.Module,
        keys: nn.Module,
        activation: nn.Module,
        values: nn.Module,
        *,
        dynamic: bool = False,
    ) -> None:
        super().__init__()
        self.dynamic = dynamic
        self.query = query
        self.keys = keys
        self.activation = activation
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        """Sum the values by the query's similarity to their keys."""
        context = (x,) if self.dynamic else ()
        weights = self.activation(self.keys(self.query(x), *context))
        return self.values(weights, *context)


class ProjectedKeys(nn.Module):
    r"""Keys of attention: one for every pixel, computed from the input.

    .. math:: s_{hij} = \frac{1}{\sqrt d} \langle q_{hi}, (W_k x)_{hj} \rangle

    in `heads <https://arxiv.org/abs/1706.03762>`_ h of d = C / heads channels.

    Args:
        channels: channels C.
        heads: a divisor of C.
        device, dtype: of the parameters.

    Shapes:
        - query and input: :math:`(N, C, H, W)`
        - output: :math:`(N, \mathrm{heads}, HW, HW)`
    """

    def __init__(self, channels: int, heads: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.heads = heads
        self.proj = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.proj.reset_parameters()

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        """Return the similarity of every query pixel to every pixel of `x`."""
        q, k = (y.flatten(2).unflatten(1, (self.heads, -1)) for y in (query, self.proj(x)))
        return q.transpose(2, 3) @ k / q.shape[2] ** 0.5


class ProjectedValues(nn.Module):
    r"""Values of attention: one for every pixel, computed from the input, and a projection of their sums.

    .. math:: y = W_o\, \Bigl[ \sum_j a_{hij} (W_v x)_{hj} \Bigr]_h

    Args:
        channels: channels C.
        heads: a divisor of C.
        device, dtype: of the parameters.

    Shapes:
        - weights: :math:`(N, \mathrm{heads}, HW, HW)`
        - input and output: :math:`(N, C, H, W)`
    """

    def __init__(self, channels: int, heads: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.heads = heads
        self.proj = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)
        self.out = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.proj.reset_parameters()
        self.out.reset_parameters()

    def forward(self, weights: Tensor, x: Tensor) -> Tensor:
        """Return the weighted sums of the pixels' values."""
        v = self.proj(x).flatten(2).unflatten(1, (self.heads, -1))
        return self.out((v @ weights.transpose(2, 3)).flatten(1, 2).unflatten(2, x.shape[2:]))


class FFNifiedAttention(MetaMixer):
    r"""Token mixer of FFNet, `MetaMixer Is All You Need <https://arxiv.org/abs/2406.02021>`_.

    .. math:: y = k_v * \mathrm{GELU}(k_k * \mathrm{BN}(W x))

    with depthwise kernels as keys and values. Those of 7x7 are trained beside 3x3 kernels, each with a batch norm
    (`RepDepthwiseConv2d`); smaller ones are plain convolutions.

    Args:
        channels: channels C.
        kernel_size: of keys and values, odd.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `kernel_size` is even.
    """

    def __init__(self, channels: int, kernel_size: int = 7, *, device=None, dtype=None) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive: got {kernel_size}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def depthwise() -> nn.Module:
            if kernel_size >= 7:
                return RepDepthwiseConv2d(channels, kernel_size, kernel_size // 2, **factory)
            margin = kernel_size // 2
            return nn.Conv2d(channels, channels, kernel_size, padding=margin, groups=channels, **factory)

        super().__init__(ConvNorm2d(channels, channels, **factory), depthwise(), nn.GELU(), depthwise())

    def reset_parameters(self) -> None:
        """Draw new weights and forget the running statistics."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()


class _Similarity(nn.Module):
    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("nchw,ncuv->nhwuv", query, x)


class _WeightedSum(nn.Module):
    def forward(self, weights: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("nhwuv,ncuv->nchw", weights, x) / (x.shape[2] * x.shape[3])


CASES = (
    Case(
        MetaMixer,
        {
            "query": nn.Identity(),
            "keys": _Similarity(),
            "activation": nn.GELU(),
            "values": _WeightedSum(),
            "dynamic": True,
        },
        inputs=((2, 4, 5, 3),),
        output=(2, 4, 5, 3),
        minimal=(1, 4, 1, 1),
        channels_last=False,
    ),
    Case(
        FFNifiedAttention,
        {"channels": 4},
        inputs=((2, 4, 9, 7),),
        output=(2, 4, 9, 7),
        minimal=(2, 4, 1, 1),
        raises=(
            Raises(
                ValueError, "kernel_size must be odd and positive: got 4", {"channels": 4, "kernel_size": 4}
            ),
        ),
    ),
    Case(
        FFNifiedAttention,
        {"channels": 3, "kernel_size": 3},
        inputs=((2, 3, 5, 7),),
        output=(2, 3, 5, 7),
        id="3",
        minimal=(2, 3, 1, 1),
    ),
)
