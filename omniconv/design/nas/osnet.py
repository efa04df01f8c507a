"""The search of OSNet-AIN: where instance norms belong, learned by gradients through relaxed choices.

Paper: Zhou et al., https://arxiv.org/abs/1910.06827, section 3.3. Here the choices are judged on images of another
domain than those that train the weights, which is what the norms are for; the paper's code updates both on one batch.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.models.image.osnet import PLACES, OSBlock, OSNet, OSNetConfig, Place, init_weights

__all__ = ["MixedOSBlock", "SearchOSNet", "search_places"]

Batch = tuple[Tensor, Tensor]


class MixedOSBlock(nn.Module):
    r"""Every candidate of a block, mixed by a relaxed draw of one of them.

    .. math:: y = \sum_i p_i\, f_i(x), \qquad
              p = \mathrm{softmax}\bigl((\log \max(w, 0) + g) / \lambda\bigr), \qquad g_i \sim \mathrm{Gumbel}(0, 1)

    Args:
        in_channels, out_channels, streams: of the candidates.
    """

    def __init__(self, in_channels: int, out_channels: int, streams: int) -> None:
        super().__init__()
        self.candidates = nn.ModuleList(
            OSBlock(in_channels, out_channels, streams, place) for place in PLACES
        )
        self.weights = nn.Parameter(torch.ones(len(PLACES)))
        self.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixture."""
        logits = (self.weights.relu() + 1e-12).log()
        shares = F.gumbel_softmax(logits, self.temperature)
        outputs = torch.stack([candidate(x) for candidate in self.candidates])
        return torch.einsum("i,i...->...", shares, outputs)

    def place(self) -> Place:
        """Return the choice of the largest weight."""
        return PLACES[int(self.weights.argmax())]


class SearchOSNet(nn.Module):
    """An OSNet whose blocks are all mixtures.

    Args:
        config: of the network; its `places` say how many blocks each stage has.
        num_classes: identities.
        in_chans: channels of the images.
    """

    def __init__(self, config: OSNetConfig, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.net = OSNet(config, num_classes, in_chans)
        channels = config.widths[0]
        for name, width in zip(self.net.stages, config.widths[1:], strict=True):
            stage = cast(nn.Sequential, self.net.get_submodule(name))
            for index in range(len(stage)):
                stage[index] = MixedOSBlock(channels, width, config.streams)
                channels = width
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of images under fresh draws."""
        return self.net(x)

    def mixtures(self) -> list[MixedOSBlock]:
        """Return the mixed blocks, in the order in which they run."""
        return [module for module in self.modules() if isinstance(module, MixedOSBlock)]

    def found(self) -> OSNetConfig:
        """Return the configuration of the largest weights."""
        places = iter([mixture.place() for mixture in self.mixtures()])
        stages = tuple(tuple(next(places) for _ in stage) for stage in self.net.config.places)
        return dataclasses.replace(self.net.config, places=stages)


def search_places(
    network: SearchOSNet,
    batches: Iterable[tuple[Batch, Batch]],
    steps: int,
    *,
    lr: float = 2e-3,
    choice_lr: float = 0.1,
    temperatures: tuple[float, float] = (10.0, 1.0),
) -> OSNetConfig:
    """Search, and return the configuration that was found.

    Args:
        network: is trained in place.
        batches: pairs of (images, identities): one trains the weights, the other, of another domain, the choices.
        steps: how many pairs to take.
        lr: of the weights.
        choice_lr: of the choices.
        temperatures: of the draws at the first and last step; falls geometrically.
    """
    choices = [mixture.weights for mixture in network.mixtures()]
    chosen = {id(weight) for weight in choices}
    weights = torch.optim.AdamW([p for p in network.parameters() if id(p) not in chosen], lr)
    choosing = torch.optim.Adam(choices, choice_lr)
    network.train()
    for step, pair in zip(range(steps), batches, strict=False):
        start, end = (math.log(temperature) for temperature in temperatures)
        for mixture in network.mixtures():
            mixture.temperature = math.exp(start + (end - start) * step / max(1, steps - 1))
        for optimizer, (images, identities) in zip((weights, choosing), pair, strict=True):
            network.zero_grad(set_to_none=True)
            F.cross_entropy(network(images), identities, label_smoothing=0.1).backward()
            optimizer.step()
    return network.found()
