"""What blocks do to frequencies: amplitudes and variances of feature maps, and noise of one band in the images.

Paper: Park and Kim, How Do Vision Transformers Work?, https://arxiv.org/abs/2202.06709, by which attention takes high
frequencies and variance away and convolution puts them in.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from omniconv.core.seeds import generator
from omniconv.inspect.artifact import Artifact
from omniconv.inspect.modes import evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BandRobustness",
    "FeatureSpectra",
    "band_noise",
    "band_robustness",
    "feature_spectra",
    "log_amplitude",
]

_EPS = 1e-6


def log_amplitude(x: Tensor) -> Tensor:
    r"""Return the mean log amplitude of maps (N, C, H, W) from frequency 0 to pi, relative to that at 0.

    .. math:: a(f) = \frac{1}{NC} \sum_{n,c} \log
        \frac{|\mathcal{F} x_{nc}(f, f)|}{|\mathcal{F} x_{nc}(0, 0)|}

    The frequencies are those of the diagonal, as many as half of the shorter side and one more: (F,).
    """
    height, width = x.shape[2:]
    steps = min(height, width) // 2 + 1
    places = torch.arange(steps, device=x.device, dtype=torch.float64) / max(1, steps - 1)
    rows, columns = ((places * (size // 2)).round().long() for size in (height, width))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    diagonal = torch.fft.fft2(wide)[..., rows, columns].abs().add(_EPS).log().mean((0, 1))
    return diagonal - diagonal[0]


class FeatureSpectra(Artifact):
    """Maps in their order: `data["layer"]` are names (L,), `data["frequency"]` (F,) shares of pi.

    `data["amplitude"]` is (L, F), relative to that of frequency 0; `data["variance"]` (L,) over the pixels of a map,
    the mean over images and channels.
    """

    title = "Spectra of feature maps"

    @property
    def high(self) -> np.ndarray:
        """The amplitude at frequency pi of every map, (L,)."""
        return self.data["amplitude"][:, -1]

    def plot(self) -> "Figure":
        """Draw the spectra, and amplitude at pi and variance over the depth."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3.5), layout="constrained")
        spectra, high, variance = figure.subplots(1, 3)
        for index, name in enumerate(self.data["layer"]):
            shade = 0.85 - 0.8 * index / max(1, len(self.data["layer"]) - 1)
            spectra.plot(
                self.data["frequency"], self.data["amplitude"][index], color=str(shade), label=str(name)
            )
        spectra.set(xlabel="frequency / pi", ylabel="relative log amplitude")
        high.plot(self.high, marker="o")
        high.set(xlabel="map", ylabel="relative log amplitude at pi")
        variance.plot(self.data["variance"], marker="o")
        variance.set(xlabel="map", ylabel="variance")
        return figure


def feature_spectra(maps: dict[str, Tensor], frequencies: int = 17) -> FeatureSpectra:
    """Return the spectra and variances of feature maps (N, C, H, W), by name and in the order of the network.

    `omniconv.inspect.cam.base.activations` collects maps of a network.
    """
    grid = np.linspace(0, 1, frequencies)
    amplitudes = []
    for one in maps.values():
        amplitude = log_amplitude(one.detach()).cpu().numpy()
        amplitudes.append(np.interp(grid, np.linspace(0, 1, len(amplitude)), amplitude))
    return FeatureSpectra(
        {
            "layer": np.array(list(maps)),
            "frequency": grid,
            "amplitude": np.array(amplitudes),
            "variance": np.array([float(one.detach().float().var((2, 3)).mean()) for one in maps.values()]),
        }
    )


def band_noise(x: Tensor, low: float, high: float, strength: float, seed: int = 0) -> Tensor:
    """Return images (N, C, H, W) with noise whose frequencies lie in [low, high), shares of pi.

    Args:
        x: images.
        low: where the band begins; a frequency is the larger of its vertical and horizontal part.
        high: where it ends; 1 takes in pi itself.
        strength: standard deviation of the noise of every image.
        seed: of the noise.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"low and high must fulfil 0 <= low < high <= 1: got {low} and {high}")
    rows, columns = (torch.fft.fftfreq(size, device=x.device).abs() * 2 for size in x.shape[2:])
    frequency = torch.maximum(rows[:, None], columns)
    band = (frequency >= low) & ((frequency < high) | (high == 1))
    if not band.any():
        raise ValueError(f"images of {tuple(x.shape[2:])} pixels have no frequency in [{low}, {high})")
    noise = torch.randn(x.shape, generator=generator(seed, "band noise")).to(x)
    noise = torch.fft.ifft2(torch.fft.fft2(noise) * band).real
    return x + strength * noise / noise.square().mean((1, 2, 3), keepdim=True).sqrt()


class BandRobustness(Artifact):
    """`data["accuracy"]` (B,) under noise of the bands between the B + 1 `data["edges"]`; `data["clean"]` without."""

    title = "Accuracy under noise of one frequency band"

    def plot(self) -> "Figure":
        """Draw the accuracy that every band leaves."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axis = figure.subplots()
        axis.stairs(self.data["accuracy"], self.data["edges"])
        axis.axhline(float(self.data["clean"]), linestyle=":", color="gray")
        axis.set(xlabel="frequency / pi", ylabel="accuracy", ylim=(0, 1.02))
        return figure


@torch.no_grad()
def band_robustness(
    model: nn.Module, x: Tensor, labels: Tensor, *, bands: int = 5, strength: float = 0.5, seed: int = 0
) -> BandRobustness:
    """Return the accuracy of a classifier on images with noise of one frequency band after another.

    Args:
        model: gives logits (N, K); it is run in eval mode and comes back as it was.
        x: images (N, C, H, W), preprocessed as the model expects them.
        labels: (N,).
        bands: equally wide bands from 0 to pi.
        strength: standard deviation of the noise.
        seed: of the noise.
    """

    def right(images: Tensor) -> float:
        parts = zip(images.split(500), labels.split(500), strict=True)
        return sum(int((model(part).argmax(1) == answers).sum()) for part, answers in parts) / len(labels)

    edges = np.linspace(0, 1, bands + 1)
    with evaluating(model):
        found = [right(band_noise(x, low, high, strength, seed)) for low, high in pairwise(edges.tolist())]
        clean = right(x)
    return BandRobustness({"accuracy": np.array(found), "edges": edges, "clean": np.array(clean)})
