"""ULSAM: every subspace of the channels weighs the places of its map by itself, for two weights a channel.

Paper: Saini et al., https://arxiv.org/abs/2006.15102. The subspaces are the groups of two convolutions, so that one
pass serves all of them. The authors' code loops over the subspaces, gives both convolutions biases, which the batch
norms behind them undo, and sets the norms' momentum to 0.9 (of the new value); here it is torch's 0.1.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["ULSAM", "substitute_ulsam"]


class ULSAM(nn.Module):
    r"""Subspace attention of `ULSAM <https://arxiv.org/abs/2006.15102>`_.

    .. math:: y_s = x_s + A_s \cdot x_s, \qquad
              A_s = \mathrm{softmax}_{h,w}\bigl(\delta(P_s * \mathrm{maxpool}_{3 \times 3}(\delta(D_s * x_s)))\bigr)

    for each subspace s of G = m / g channels, with a depthwise 1x1 convolution :math:`D_s` (G weights), one
    pointwise filter :math:`P_s` (G weights) and :math:`\delta` for batch norm and ReLU. 2 m weights in all,
    whatever g is.

    Args:
        channels: m.
        subspaces: g, a divisor of m.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, m, H, W)`

    Raises:
        ValueError: if `subspaces` does not divide `channels`.
    """

    def __init__(self, channels: int, subspaces: int = 4, *, device=None, dtype=None) -> None:
        super().__init__()
        if subspaces < 1 or channels % subspaces:
            raise ValueError(f"channels must be divisible by subspaces: got {channels} and {subspaces}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.subspaces = subspaces
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels, bias=False, **factory)
        self.bn_dws = nn.BatchNorm2d(channels, **factory)
        self.conv_point = nn.Conv2d(channels, subspaces, 1, groups=subspaces, bias=False, **factory)
        self.bn_point = nn.BatchNorm2d(subspaces, **factory)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in (self.conv_dws, self.bn_dws, self.conv_point, self.bn_point):
            module.reset_parameters()

    def attention(self, x: Tensor) -> Tensor:
        """Return the weight of every place for every subspace, (N, g, H, W); over the places they sum to 1."""
        y = F.max_pool2d(F.relu(self.bn_dws(self.conv_dws(x))), 3, stride=1, padding=1)
        y = F.relu(self.bn_point(self.conv_point(y)))
        return y.flatten(2).softmax(2).unflatten(2, y.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` and what each subspace attends to in it, added."""
        weights = self.attention(x).repeat_interleave(x.shape[1] // self.subspaces, 1)
        return x + weights * x


def substitute_ulsam(model: nn.Module, names: Sequence[str], images: Tensor, subspaces: int = 4) -> nn.Module:
    """Return a copy of a network in which modules stand for blocks, as the paper makes MobileNets cheaper.

    MobileNetV2 with the paper's positions 14 and 17 is
    `substitute_ulsam(create_model("mobilenetv2_100"), ("blocks.4.2", "blocks.5.2"), images)`.

    Args:
        model: the network; it is left as it is.
        names: dotted names of the blocks, each of which must put out maps of the shape it takes.
        images: a batch that the network takes, from which the channels are read.
        subspaces: g of every module.

    Raises:
        ValueError: if there is no such block, it does not run, or it changes the shape of its map.
    """
    model = copy.deepcopy(model)
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise ValueError(f"names must be modules of {type(model).__name__}: got {name!r}")
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    hooks = [
        known[name].register_forward_hook(
            lambda m, x, y, name=name: shapes.update({name: (x[0].shape, y.shape)})  # pyright: ignore
        )
        for name in names
    ]
    training = model.training
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    for name in names:
        if name not in shapes:
            raise ValueError(f"names must be blocks that run: {name!r} does not")
        before, after = shapes[name]
        if before != after:
            raise ValueError(f"{name} must put out what it takes: got {tuple(before)} to {tuple(after)}")
        parameter = next(known[name].parameters())
        model.set_submodule(name, ULSAM(before[1], subspaces, device=parameter.device, dtype=parameter.dtype))
    return model.train(training)


CASES = (
    Case(
        ULSAM,
        {"channels": 12, "subspaces": 3},
        inputs=((2, 12, 7, 5),),
        output=(2, 12, 7, 5),
        minimal=(1, 12, 1, 1),
        raises=(
            Raises(
                ValueError,
                "channels must be divisible by subspaces: got 12 and 5",
                {"channels": 12, "subspaces": 5},
            ),
        ),
    ),
)
