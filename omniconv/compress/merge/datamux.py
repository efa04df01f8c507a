"""DataMUX: several inputs through a network at once, as one mixture.

Paper: Murahari et al., DataMUX: Data Multiplexing for Neural Networks, https://arxiv.org/abs/2202.09318. Each input is
changed by a map of its own before all are averaged, so that the network can tell them apart; behind it their answers
are separated again. The whole is trained together, sequence models first on `retrieval_loss` alone.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "ConvMultiplexer", "DataMux", "IndexDemultiplexer", "MLPDemultiplexer", "Multiplexer", "retrieval_loss",
]  # fmt: skip


class Multiplexer(nn.Module):
    r"""The mean of inputs under fixed maps of their channels (`DataMUX <https://arxiv.org/abs/2202.09318>`_).

    .. math:: m = \frac{1}{N} \sum_i \phi_i x_i

    Args:
        count: N, inputs in a mixture.
        channels: C.
        kind: what the maps are: "hadamard", products with normal vectors; "orthogonal", random orthogonal matrices;
            "mask", each keeps C / N channels of its own.

    Shapes:
        - input: :math:`(B, N, C, *S)`
        - output: :math:`(B, C, *S)`

    Raises:
        ValueError: if `kind` is unknown, or masks cannot share out the channels.
    """

    maps: Tensor

    def __init__(
        self, count: int, channels: int, kind: Literal["hadamard", "orthogonal", "mask"] = "hadamard", *,
        device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.count = count
        place = {"device": device, "dtype": dtype}
        if kind == "hadamard":
            maps = torch.randn(count, channels, **place)
        elif kind == "orthogonal":
            maps = torch.linalg.qr(torch.randn(count, channels, channels, **place)).Q
        elif kind == "mask":
            if channels % count:
                raise ValueError(f"count must divide channels for masks: got {count} and {channels}")
            maps = torch.eye(count, **place).repeat_interleave(channels // count, 1)
        else:
            raise ValueError(f"kind must be 'hadamard', 'orthogonal' or 'mask': got {kind!r}")
        self.register_buffer("maps", maps)

    def forward(self, x: Tensor) -> Tensor:
        """Map the inputs and average them."""
        return self._map(x, self.maps).mean(1)

    def separate(self, mixture: Tensor) -> Tensor:
        r"""Return :math:`N \phi_i^\top m`, every input and what it hears of the others, (B, N, C, \*S)."""
        maps = self.maps if self.maps.ndim == 2 else self.maps.mT
        return self.count * self._map(mixture.unsqueeze(1).expand(-1, self.count, *mixture.shape[1:]), maps)

    def _map(self, x: Tensor, maps: Tensor) -> Tensor:
        if maps.ndim == 2:
            return x * maps.reshape(*maps.shape, *(1,) * (x.ndim - 3))
        return torch.einsum("nij,bnj...->bni...", maps, x)


class ConvMultiplexer(nn.Module):
    r"""The mean of images under learned convolutions, one for each place in the mixture.

    .. math:: m = \frac{1}{N} \sum_i \tanh(K_i * x_i + b_i)

    Args:
        count: N.
        in_channels, out_channels: of an image and of the mixture.
        kernel_size: odd.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(B, N, C_\mathrm{in}, H, W)`
        - output: :math:`(B, C_\mathrm{out}, H, W)`
    """

    def __init__(
        self,
        count: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.count = count
        self.maps = nn.Conv2d(
            count * in_channels, count * out_channels, kernel_size, padding=kernel_size // 2, groups=count,
            device=device, dtype=dtype,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the images and average them."""
        return self.maps(x.flatten(1, 2)).tanh().unflatten(1, (self.count, -1)).mean(1)


class MLPDemultiplexer(nn.Module):
    """A small network for every place in the mixture.

    Args:
        count: N.
        features: D, of the mixture behind the base network.
        outputs: O, for every input.
        hidden: width.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(B, D, *S)`
        - output: :math:`(B, N, O, *S)`
    """

    def __init__(
        self, count: int, features: int, outputs: int, hidden: int = 64, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.count = count
        self.first = nn.Linear(features, count * hidden, **place)
        self.second = nn.Conv1d(count * hidden, count * outputs, 1, groups=count, **place)

    def forward(self, h: Tensor) -> Tensor:
        """Return every input's outputs."""
        hidden = F.gelu(self.first(h.movedim(1, -1))).movedim(-1, 1)
        return self.second(hidden.flatten(2) if h.ndim > 2 else hidden.unsqueeze(2)).reshape(
            len(h), self.count, -1, *h.shape[2:]
        )


class IndexDemultiplexer(nn.Module):
    r"""One network for all places in the mixture, which is told the place.

    .. math:: y_i = W_2\, \mathrm{GELU}(W_1 [h, p_i])

    Args:
        count: N.
        features: D, of the mixture and of a place's embedding.
        outputs: O, for every input.
        hidden: width.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(B, D, *S)`
        - places, in the place of the learned ones: :math:`(B, N, D)`
        - output: :math:`(B, N, O, *S)`
    """

    def __init__(
        self, count: int, features: int, outputs: int, hidden: int = 64, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.count = count
        self.places = nn.Parameter(torch.randn(count, features, **place))
        self.first = nn.Linear(2 * features, hidden, **place)
        self.second = nn.Linear(hidden, outputs, **place)

    def forward(self, h: Tensor, places: Tensor | None = None) -> Tensor:
        """Return every input's outputs."""
        features = h.shape[1]
        of_mixture, of_place = self.first.weight.split(features, 1)
        # W [h, p] is the sum of both parts, of which that of h is the same for all places.
        shared = F.linear(h.movedim(1, -1), of_mixture, self.first.bias).unsqueeze(1)
        own = F.linear(self.places[None] if places is None else places, of_place)
        own = own.reshape(*own.shape[:2], *(1,) * (h.ndim - 2), -1)
        return self.second(F.gelu(shared + own)).movedim(-1, 2)


class DataMux(nn.Module):
    r"""A network that takes N inputs at a time (`DataMUX <https://arxiv.org/abs/2202.09318>`_).

    .. math:: y_1, \dots, y_N = \mathrm{demux}\Bigl(f\Bigl(\frac{1}{N} \sum_i \phi_i(x_i)\Bigr)\Bigr)

    Called as the network would be without it; inputs that follow each other in the batch are mixed, so they are to be
    shuffled in training. The base network is run for one N-th of the batch.

    Args:
        base: f, from a mixture (B, C, \*S) to features (B, D) or (B, D, L).
        mux: mixes, (B, N, C, \*S) to (B, C', \*S).
        demux: separates, (B, D, \*L) to (B, N, O, \*L).
        prefix: have N steps in front of sequences, of these channels C, that show the base network each input's place:
            input i has a token of its own at step i and a common one elsewhere. What the base makes of step i is
            then the place's embedding for an `IndexDemultiplexer`.

    Shapes:
        - input: :math:`(B, C, *S)`, any batch B
        - output: :math:`(B, O)` or :math:`(B, O, L)`
    """

    def __init__(
        self,
        base: nn.Module,
        mux: Multiplexer | ConvMultiplexer,
        demux: MLPDemultiplexer | IndexDemultiplexer,
        *,
        prefix: int = 0,
    ) -> None:
        super().__init__()
        if mux.count != demux.count:
            raise ValueError(f"mux and demux must be for as many inputs: got {mux.count} and {demux.count}")
        if prefix and not isinstance(demux, IndexDemultiplexer):
            raise ValueError("a prefix is for an IndexDemultiplexer")
        self.base, self.mux, self.demux = base, mux, demux
        self.tokens = nn.Parameter(torch.randn(mux.count + 1, prefix)) if prefix else None

    @property
    def count(self) -> int:
        """Inputs in a mixture."""
        return self.mux.count

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all inputs."""
        size = len(x)
        # The last mixture is filled up with the last input.
        x = torch.cat([x, x[-1:].expand(-size % self.count, *x.shape[1:])]).unflatten(0, (-1, self.count))
        if self.tokens is None:
            y = self.demux(self.base(self.mux(x)))
        else:
            *own, common = self.tokens
            place = torch.eye(self.count, device=x.device, dtype=x.dtype).unsqueeze(1)
            prefix = place * torch.stack(own).unsqueeze(2) + (1 - place) * common[:, None]
            h = self.base(self.mux(torch.cat([prefix.expand(len(x), *prefix.shape), x], -1)))
            y = self.demux(h[..., self.count :], h[..., : self.count].mT)
        return y.flatten(0, 1)[:size]

    def ensemble(self, x: Tensor) -> Tensor:
        """Return the mean of N outputs of every input, which is alone in its mixture, N times."""
        return self(x.repeat_interleave(self.count, 0)).unflatten(0, (-1, self.count)).mean(1)


def retrieval_loss(logits: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Return the cross-entropy of a random input's token at every step of every mixture.

    Paired with a task's loss at the weight 0.1, and alone at first, it makes the network keep inputs apart.

    Args:
        logits: of a `DataMux` that predicts tokens.
        tokens: its inputs.
        count: N.

    Shapes:
        - logits: :math:`(B, V, L)`, B a multiple of N
        - tokens: :math:`(B, L)`
    """
    logits, tokens = logits.unflatten(0, (-1, count)), tokens.unflatten(0, (-1, count))
    chosen = torch.randint(count, (len(tokens), 1, tokens.shape[2]), device=tokens.device)
    picked = logits.gather(1, chosen.unsqueeze(2).expand(-1, -1, logits.shape[2], -1))
    return F.cross_entropy(picked.squeeze(1), tokens.gather(1, chosen).squeeze(1))
