"""UniRepLKNet for every modality: front ends that lay out sound, video, points and series as a map for one network.

Paper: Zhang et al., Scaling Up Your Kernels, https://arxiv.org/abs/2410.08049. The network is that of
`models/image/unireplknet.py`, unchanged; each front end says which data a pixel of its map stands for.
"""

from typing import cast

import torch
from torch import Tensor, nn

from omniconv.layers.conv.reparam import reparameterize
from omniconv.models.image.unireplknet import UniRepLKNet, UniRepLKNetConfig

__all__ = ["DepthViews", "Forecaster", "FrameTiles", "LogMel", "SeriesMap", "UniversalUniRepLKNet"]


def _mel(frequency: Tensor) -> Tensor:
    return 2595 * torch.log10(1 + frequency / 700)


def _mel_filters(bins: int, frequencies: int, rate: int) -> Tensor:
    """Return (bins, frequencies): triangles that are equally wide on the mel scale, from 0 to half the rate."""
    hertz = torch.linspace(0, rate / 2, frequencies, dtype=torch.float64)
    corners = torch.linspace(0, float(_mel(hertz[-1])), bins + 2, dtype=torch.float64)[:, None]
    mel = _mel(hertz)
    rising = (mel - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - mel) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


class LogMel(nn.Module):
    r"""Sound as a picture: logarithms of the energy in mel bands (rows) over time (columns).

    .. math:: y_{ft} = \log\Bigl(\epsilon + \sum_k M_{fk} \bigl|\mathrm{STFT}(x)_{kt}\bigr|^2\Bigr)

    Args:
        rate: samples a second.
        bins: mel bands F.
        window: samples under one column, tapered by a Hann window.
        hop: samples from one column to the next.

    Shapes:
        - input: :math:`(N, T)`, T at least `window`
        - output: :math:`(N, 1, F, 1 + \lfloor (T - window) / hop \rfloor)`
    """

    channels = 1
    taper: Tensor
    filters: Tensor

    def __init__(self, rate: int, bins: int = 128, window: int = 400, hop: int = 160) -> None:
        super().__init__()
        self.window, self.hop = window, hop
        self.register_buffer("taper", torch.hann_window(window), persistent=False)
        self.register_buffer("filters", _mel_filters(bins, window // 2 + 1, rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the log-mel map of waveforms."""
        frames = x.unfold(1, self.window, self.hop) * self.taper
        energy = torch.fft.rfft(frames).abs().square()
        return (energy @ self.filters.T + 1e-6).log().transpose(1, 2).unsqueeze(1)

    def samples(self, column: int) -> range:
        """Return the samples that a column of the map depends on."""
        return range(column * self.hop, column * self.hop + self.window)


class FrameTiles(nn.Module):
    r"""Video as one large picture: frames side by side, in rows, in the order of time.

    Args:
        columns: frames a row; must divide the number of frames.
        channels: channels of a frame.

    Shapes:
        - input: :math:`(N, T, C, H, W)`
        - output: :math:`(N, C, H T / columns, W \cdot columns)`
    """

    def __init__(self, columns: int, channels: int = 3) -> None:
        super().__init__()
        self.columns, self.channels = columns, channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the tiled frames."""
        n, t, c, h, w = x.shape
        if t % self.columns:
            raise ValueError(f"columns must divide the number of frames: got {self.columns} and {t}")
        x = x.reshape(n, t // self.columns, self.columns, c, h, w)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(n, c, t // self.columns * h, self.columns * w)

    def pixel(self, row: int, column: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (frame, row, column) of what a pixel of the map shows, for frames of `height` x `width`."""
        return row // height * self.columns + column // width, row % height, column % width


class DepthViews(nn.Module):
    """Points as three depth pictures, seen along the axes: each pixel holds how near its nearest point is.

    Args:
        size: pixels S along each side.
        extent: half the side of the cube around the origin that the pictures show; points beyond are at its faces.

    Shapes:
        - input: :math:`(N, P, 3)`
        - output: :math:`(N, 3, S, S)`, from 0 (nothing, or the far face) to 1 (the near face)
    """

    channels = 3

    def __init__(self, size: int = 64, extent: float = 1.0) -> None:
        super().__init__()
        self.size, self.extent = size, extent

    def _project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixel (N, 3, P) of every point in every view, and its nearness."""
        unit = ((points / self.extent + 1) / 2).clamp(0, 1)
        cell = (unit * self.size).long().clamp(max=self.size - 1)
        pixel = torch.stack(
            [cell[..., (v + 1) % 3] * self.size + cell[..., (v + 2) % 3] for v in range(3)], 1
        )
        return pixel, unit.transpose(1, 2)

    def forward(self, points: Tensor) -> Tensor:
        """Return the three depth pictures."""
        pixel, near = self._project(points)
        views = near.new_zeros(len(points), 3, self.size**2).scatter_reduce(2, pixel, near, "amax")
        return views.unflatten(2, (self.size, self.size))

    def points(self, points: Tensor) -> Tensor:
        """Return (N, 3, S, S): which point each pixel shows, the first of equally near ones; -1 for none."""
        pixel, near = self._project(points)
        nearest = self(points).flatten(2).gather(2, pixel)
        count = points.shape[1]
        numbers = torch.arange(count, device=points.device).expand_as(pixel)
        numbers = torch.where(near == nearest, numbers, count)
        shown = numbers.new_full((len(points), 3, self.size**2), count).scatter_reduce(
            2, pixel, numbers, "amin"
        )
        return torch.where(shown == count, -1, shown).unflatten(2, (self.size, self.size))


class SeriesMap(nn.Module):
    """A series as a picture: every step embedded from its neighbours, and the embeddings laid out row after row.

    Args:
        variables: D of the series.
        embedding: length E of a step's embedding; E times the steps must be `width` times a whole number.
        width: columns W of the map; a step a row if None.

    Shapes:
        - input: :math:`(N, L, D)`
        - output: :math:`(N, 1, L E / W, W)`
    """

    channels = 1

    def __init__(self, variables: int, embedding: int = 64, width: int | None = None) -> None:
        super().__init__()
        self.width = width or embedding
        self.token = nn.Conv1d(variables, embedding, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.token.weight, nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of the embedded series."""
        if x.shape[1] * self.token.out_channels % self.width:
            raise ValueError(
                f"width must divide steps times embedding: got {self.width}, {x.shape[1]} and {self.token.out_channels}"
            )
        y = self.token(x.transpose(1, 2)).transpose(1, 2)
        return y.reshape(len(x), 1, -1, self.width)

    def step(self, row: int, column: int) -> tuple[int, int]:
        """Return (step, entry of its embedding) that a pixel of the map holds."""
        return divmod(row * self.width + column, self.token.out_channels)


class UniversalUniRepLKNet(nn.Module):
    """A front end before the network of `UniRepLKNet <https://arxiv.org/abs/2410.08049>`_.

    Args:
        front: `LogMel`, `FrameTiles`, `DepthViews`, `SeriesMap`, or any module that gives a map and has `channels`.
        config: of the network.
        num_classes: outputs.
    """

    def __init__(self, front: nn.Module, config: UniRepLKNetConfig, num_classes: int) -> None:
        super().__init__()
        self.front = front
        self.backbone = UniRepLKNet(config, num_classes, cast(int, front.channels))

    def forward(self, data: Tensor) -> Tensor:
        """Return (N, num_classes)."""
        return self.backbone(self.front(data))

    def deploy(self) -> "UniversalUniRepLKNet":
        """Return an eval-mode copy in which the network's branches are merged."""
        return reparameterize(self)


class Forecaster(nn.Module):
    r"""Forecasts of the series of many nodes, each on its own, by one network.

    .. math:: \hat y = \mu + \sigma\, f\Bigl(\frac{x - \mu}{\sigma}\Bigr)

    with the mean and deviation of what is seen of each series.

    Args:
        horizon: steps H that are forecast.
        config: of the network.
        embedding, width: of the `SeriesMap`.

    Shapes:
        - input: :math:`(N, L, D)`, D nodes
        - output: :math:`(N, H, D)`
    """

    def __init__(
        self, horizon: int, config: UniRepLKNetConfig, embedding: int = 64, width: int | None = None
    ) -> None:
        super().__init__()
        self.net = UniversalUniRepLKNet(SeriesMap(1, embedding, width), config, horizon)

    def forward(self, x: Tensor) -> Tensor:
        """Return the forecast."""
        mean = x.mean(1, keepdim=True)
        scale = (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        nodes = ((x - mean) / scale).transpose(1, 2).flatten(0, 1).unsqueeze(2)
        return mean + scale * self.net(nodes).unflatten(0, (len(x), x.shape[2])).transpose(1, 2)
