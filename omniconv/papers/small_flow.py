"""A small normalizing flow for checks: Glow's steps, with whatever is to be compared as their mixing."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator

__all__ = ["Flow", "Mix1x1", "bits_per_dim", "digit_counts", "train_flow"]

LEVELS = 17
"""Grey levels of the handwritten digits."""


def digit_counts() -> tuple[Tensor, Tensor]:
    """Return (train, test) pictures (N, 1, 8, 8) of scikit-learn's digits in whole numbers from 0 to 16."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None]  # type: ignore[attr-defined]
    images = images[torch.randperm(len(images), generator=generator(0, "digits"))]
    return images[:1300], images[1300:]


class Mix1x1(nn.Module):
    """Glow's mixing: an invertible matrix for the channels, at first a rotation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])

    def log_det(self, x: Tensor) -> Tensor:
        """Return the logarithm of the Jacobian's determinant."""
        return x.shape[2] * x.shape[3] * torch.linalg.slogdet(self.weight)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels."""
        return F.conv2d(x, self.weight[:, :, None, None])

    def inverse(self, y: Tensor) -> Tensor:
        """Undo it."""
        return F.conv2d(y, torch.linalg.inv(self.weight)[:, :, None, None])


class Step(nn.Module):
    """Scale and shift of channels, set by the first batch; mixing; affine coupling."""

    def __init__(self, channels: int, mixing: Iterable[nn.Module], width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.fresh = True
        self.mixing = nn.ModuleList(mixing)
        half = channels // 2
        last = nn.Conv2d(width, 2 * (channels - half), 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.net = nn.Sequential(
            nn.Conv2d(half, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            last,
        )

    def _coupling(self, a: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.net(a).chunk(2, 1)
        return shift, F.logsigmoid(scale + 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new maps and the logarithm of the Jacobian's determinant."""
        if self.fresh:
            self.fresh = False
            with torch.no_grad():
                self.shift.copy_(-x.mean((0, 2, 3))[:, None, None])
                self.log_scale.copy_(-torch.log(x.std((0, 2, 3)) + 1e-6)[:, None, None])
        x = (x + self.shift) * torch.exp(self.log_scale)
        log_det = x.shape[2] * x.shape[3] * self.log_scale.sum()
        for mix in self.mixing:
            if isinstance(mix, Mix1x1):
                log_det = log_det + mix.log_det(x)
            x = mix(x)
        a, b = x.tensor_split([x.shape[1] // 2], 1)
        shift, log_scale = self._coupling(a)
        return torch.cat([a, (b + shift) * log_scale.exp()], 1), log_det + log_scale.sum((1, 2, 3))

    def inverse(self, y: Tensor) -> Tensor:
        """Undo it."""
        a, b = y.tensor_split([y.shape[1] // 2], 1)
        shift, log_scale = self._coupling(a)
        x = torch.cat([a, b * torch.exp(-log_scale) - shift], 1)
        for mix in reversed(self.mixing):
            x = mix.inverse(x)  # type: ignore[operator]
        return x * torch.exp(-self.log_scale) - self.shift


class Flow(nn.Module):
    """Two levels of squeeze and steps, half of the channels leaving between them.

    Args:
        mixing: makes the mixing layers of a step for so many channels; each has `inverse`, and unless it is a `Mix1x1`
            the determinant 1.
        steps: a level.
        width: channels of the coupling networks.
    """

    def __init__(self, mixing: Callable[[int], Iterable[nn.Module]], steps: int = 4, width: int = 48) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.ModuleList(Step(channels, mixing(channels), width) for _ in range(steps))
            for channels in (4, 8)
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density (N,) of pictures (N, 1, H, W)."""
        log_prob, leaving = torch.zeros(len(x)), []
        for index, level in enumerate(self.levels):
            x = F.pixel_unshuffle(x, 2)
            for step in level:  # type: ignore[attr-defined]
                x, log_det = step(x)
                log_prob = log_prob + log_det
            if index == 0:
                x, z = x.chunk(2, 1)
                leaving.append(z)
        for z in (*leaving, x):
            log_prob = log_prob - 0.5 * (z * z + math.log(2 * math.pi)).sum((1, 2, 3))
        return log_prob

    def decode(self, inner: Tensor, outer: Tensor) -> Tensor:
        """Return the pictures of latent maps (N, 8, H / 4, W / 4) and (N, 2, H / 2, W / 2)."""
        x = inner
        for index, level in reversed(list(enumerate(self.levels))):
            if index == 0:
                x = torch.cat([x, outer], 1)
            for step in reversed(level):  # type: ignore[call-overload]
                x = step.inverse(x)
            x = F.pixel_shuffle(x, 2)
        return x


def _dequantised(images: Tensor, random: torch.Generator) -> Tensor:
    return (images + torch.rand(images.shape, generator=random)) / LEVELS - 0.5


def train_flow(
    mixing: Callable[[int], Iterable[nn.Module]], images: Tensor, seed: int, steps: int, batch: int = 128
) -> Flow:
    """Train with Adam and a one-cycle schedule, the same for everybody."""
    torch.manual_seed(derive(seed, "weights"))
    model = Flow(mixing)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.2)
    random = generator(seed, "train")
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=random)
        loss = -model.log_prob(_dequantised(images[chosen], random)).mean() / images[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def bits_per_dim(model: Flow, images: Tensor, draws: int = 8) -> float:
    """Return the mean number of bits a pixel, over some draws of the noise within a grey level."""
    random = generator(0, "noise")
    nats = [-model.log_prob(_dequantised(images, random)).mean() / images[0].numel() for _ in range(draws)]
    return (float(sum(nats)) / draws + math.log(LEVELS)) / math.log(2)
