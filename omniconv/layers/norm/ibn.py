"""IBN: instance normalisation for one half of the channels, batch normalisation for the other.

Paper: Pan et al., Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net,
https://arxiv.org/abs/1807.09441. Instance normalisation discards appearance (contrast, colour), batch normalisation
keeps content; shallow layers get both, deep layers the latter alone. Parameter names are those of the official
weights. ResNets take IBN-a and IBN-b as a configuration; `ibn_a` turns other networks into their IBN-a form.
"""

import copy
import re
from typing import TypeVar

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises

__all__ = ["IBN", "ibn_a"]

M = TypeVar("M", bound=nn.Module)


class IBN(nn.Module):
    r"""Norm of `IBN-Net <https://arxiv.org/abs/1807.09441>`_.

    .. math:: y = \bigl[\mathrm{IN}(x_{1 \ldots h}),\; \mathrm{BN}(x_{h+1 \ldots C})\bigr], \qquad
              h = \lfloor \mathrm{share} \cdot C \rfloor

    Args:
        channels: C, of the input.
        share: of the channels that instance normalisation gets.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)` with more than one pixel

    Raises:
        ValueError: if one of the two gets no channel.
    """

    def __init__(self, channels: int, share: float = 0.5, *, device=None, dtype=None) -> None:
        super().__init__()
        self.instances = int(channels * share)
        if not 0 < self.instances < channels:
            raise ValueError(
                f"both norms need channels: got {self.instances} and {channels - self.instances} of {channels}"
            )
        # Instance normalisation is group normalisation with groups of one channel.
        self.IN = nn.GroupNorm(self.instances, self.instances, device=device, dtype=dtype)
        self.BN = nn.BatchNorm2d(channels - self.instances, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Start with scales of one and shifts of zero."""
        self.IN.reset_parameters()
        self.BN.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise both parts of `x`."""
        return torch.cat((self.IN(x[:, : self.instances]), self.BN(x[:, self.instances :])), 1)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, share: float = 0.5) -> "IBN":
        """Return the layer with the scales, shifts and statistics of a batch norm."""
        ibn = cls(norm.num_features, share, device=norm.weight.device, dtype=norm.weight.dtype)
        state = norm.state_dict()
        ibn.IN.load_state_dict({name: state[name][: ibn.instances] for name in ("weight", "bias")})
        ibn.BN.load_state_dict(
            {name: value[ibn.instances :] if value.ndim else value for name, value in state.items()}
        )
        ibn.BN.eps, ibn.BN.momentum = norm.eps, norm.momentum
        return ibn.train(norm.training)


def ibn_a(
    model: M, names: str = r"\b(layer[1-3]\..*\bbn1|denseblock[1-3]\..*\bnorm1)$", share: float = 0.5
) -> M:
    """Return a copy of a network in which IBN stands for some batch norms (IBN-a).

    Args:
        model: the network; it is left as it is.
        names: regular expression that is searched in the names of the batch norms: by default it finds the first of
            every block in all but the last stage of ResNets, ResNeXts, SE-ResNets and DenseNets with the public
            names.
        share: of the channels that instance normalisation gets; the authors' DenseNets take 0.4, and put that part
            last.

    Raises:
        ValueError: if no batch norm has such a name.
    """
    model = copy.deepcopy(model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and re.search(names, name)
    ]
    if not found:
        raise ValueError(f"no batch norm is called like {names!r}")
    for name, module in found:
        model.set_submodule(name, IBN.from_batch_norm(module, share))
    return model


CASES = (
    Case(
        IBN,
        {"channels": 9},
        inputs=((3, 9, 7, 5),),
        output=(3, 9, 7, 5),
        minimal=(1, 9, 1, 2),
        raises=(
            Raises(
                ValueError,
                "both norms need channels: got 0 and 9 of 9",
                {"channels": 9, "share": 0.1},
            ),
        ),
    ),
)
