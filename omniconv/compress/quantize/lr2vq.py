"""LR2VQ: vector quantization of short representations that a learned map lifts to subvectors of the weight.

Paper: Zhu et al., Learning Low-Rank Representations for Model Compression, https://arxiv.org/abs/2211.11397. Codes are
fine-tuned as in DKM, https://arxiv.org/abs/2108.12659: while it trains, a representation is a mean of the codebook's
entries, weighted by how near they are.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.quantize.bits import pack_bits, unpack_bits
from omniconv.compress.quantize.kmeans import kmeans, nearest
from omniconv.compress.report import CompressionReport, compare, weight_layers
from omniconv.core.config import closest

__all__ = [
    "LowRankLayer", "VectorQuantizedLayer", "estimate_rank", "low_rank", "low_rank_factors", "lr2vq", "quantize_codes",
    "subvectors",
]  # fmt: skip

M = TypeVar("M", bound=nn.Module)


def subvectors(weight: Tensor, size: int) -> Tensor:
    """Return the weight (O, ...) as rows of `size` numbers that lie along the output channels, zeros at the end."""
    flat = weight.flatten(1)
    return F.pad(flat, (0, 0, 0, -len(flat) % size)).unflatten(0, (-1, size)).transpose(1, 2).flatten(0, 1)


def _joined(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the weight of `shape` that `subvectors` cut into rows."""
    return (
        rows.unflatten(0, (-1, math.prod(shape[1:])))
        .transpose(1, 2)
        .flatten(0, 1)[: shape[0]]
        .reshape(tuple(shape))
    )


def low_rank_factors(vectors: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return representations (n, rank) and a lift (rank, m) whose product comes closest to vectors (n, m).

    At full rank they are the vectors themselves and the identity.
    """
    size = vectors.shape[1]
    if rank == size:
        return vectors, torch.eye(size, device=vectors.device, dtype=vectors.dtype)
    # Eigenvectors of the small matrix of second moments, in ascending order.
    basis = (
        torch.linalg.eigh(vectors.double().T @ vectors.double()).eigenvectors.flip(1)[:, :rank].to(vectors)
    )
    return vectors @ basis, basis.T


def estimate_rank(weight: Tensor, size: int, k: int) -> int:
    r"""Return the clustering dimension with the least error, before anything is clustered.

    .. math:: \tilde d = \arg\min_d \sum_{i > d} \lambda_i
              + d\, C_d\, k^{-2/d} \Bigl(\prod_{i \le d} \lambda_i\Bigr)^{1/d}

    where :math:`\lambda` are the variances of the subvectors along their principal axes: the first part is lost to low
    rank, the second to k clusters of normal vectors in d dimensions (Zador; with balls for cells,
    :math:`C_d = 2 (1 + 2/d)^{d/2} \Gamma(1 + d/2)^{2/d} / d`). Axes along which less varies than clustering loses do
    not count.

    Args:
        weight: of a layer.
        size: m, of subvectors.
        k: entries of the codebook.
    """
    rows = subvectors(weight.detach(), size).double()
    variances = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).clamp_min(0).flip(0).tolist()
    best, least = 1, math.inf
    for d in range(1, size + 1):
        if variances[d - 1] <= 0:
            break
        constant = 2 * (1 + 2 / d) ** (d / 2) * math.gamma(1 + d / 2) ** (2 / d) / d
        spread = math.exp(sum(math.log(v) for v in variances[:d]) / d)
        clustering = constant * k ** (-2 / d) * spread
        error = sum(variances[d:]) + d * clustering
        if (d == 1 or clustering <= variances[d - 1]) and error < least:
            best, least = d, error
    return best


class _CodedLayer(nn.Module):
    """A convolution or linear layer whose weight is made by `weight`."""

    template: Any
    bias: Tensor | None

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.size, self.shape = size, tuple(layer.get_parameter("weight").shape)
        self.bias = nn.Parameter(layer.bias.detach().clone()) if isinstance(layer.bias, Tensor) else None
        bare = copy.copy(layer)
        bare._parameters = {"weight": None, "bias": None}
        # No submodule: it has no state, and only its settings are used.
        object.__setattr__(self, "template", bare)

    def weight(self) -> Tensor:
        """Return the weight that the layer computes with."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Compute what the layer computes."""
        if isinstance(self.template, nn.Linear):
            return F.linear(x, self.weight(), self.bias)
        return self.template._conv_forward(x, self.weight(), self.bias)


class LowRankLayer(_CodedLayer):
    r"""A layer of low-rank representations, to be trained (`LR2VQ <https://arxiv.org/abs/2211.11397>`_).

    .. math:: W = V B \qquad\text{or, with a codebook C,}\qquad
              W = \mathrm{softmax}\bigl(-\|V - C\|^2 / \tau\bigr)\, C B

    row by row, where rows of V stand for subvectors of m weights along the output channels.

    Args:
        layer: a convolution (not transposed) or linear layer.
        size: m.
        rank: :math:`\tilde d`, at most m; at m the map B is left out, which is plain vector quantization.
    """

    def __init__(self, layer: nn.Module, size: int, rank: int) -> None:
        super().__init__(layer, size)
        if not 1 <= rank <= size:
            raise ValueError(f"rank must be from 1 to the subvectors' size {size}: got {rank}")
        vectors, lift = low_rank_factors(subvectors(layer.get_parameter("weight").detach(), size), rank)
        self.vectors = nn.Parameter(vectors.clone())
        self.lift = nn.Parameter(lift.clone()) if rank < size else None
        self.codebook: nn.Parameter | None = None
        self.temperature = 0.0

    def cluster(self, k: int, softness: float = 0.1) -> None:
        """Make a codebook by k-means; from now on weights are made of its entries.

        Args:
            k: entries.
            softness: of the assignment, the temperature in units of the mean square error of the clusters.
        """
        codebook, codes = kmeans(self.vectors.detach(), k)
        self.temperature = (
            softness * float((self.vectors.detach() - codebook[codes]).square().sum(1).mean()) + 1e-12
        )
        self.codebook = nn.Parameter(codebook)

    def weight(self) -> Tensor:
        """Return the weight, of soft codes if there is a codebook."""
        rows = self.vectors
        if self.codebook is not None:
            apart = self.codebook.square().sum(1) - 2 * rows @ self.codebook.T
            rows = torch.softmax(-apart / self.temperature, 1) @ self.codebook
        return _joined(rows if self.lift is None else rows @ self.lift, self.shape)


class VectorQuantizedLayer(_CodedLayer):
    r"""A layer whose state is codes, a codebook and a map (`LR2VQ <https://arxiv.org/abs/2211.11397>`_).

    It takes :math:`n \lceil \log_2 k \rceil + 32 (k \tilde d + \tilde d m)` bits for n subvectors. Codebook and map may
    be trained on.

    Args:
        layer: with a codebook.
    """

    codes: Tensor

    def __init__(self, layer: LowRankLayer) -> None:
        if layer.codebook is None:
            raise ValueError("layer must have a codebook: call its cluster first")
        nn.Module.__init__(self)
        self.size, self.shape, self.bias = layer.size, layer.shape, layer.bias
        object.__setattr__(self, "template", layer.template)
        self.count = len(layer.vectors)
        self.bits = (len(layer.codebook) - 1).bit_length()
        self.codebook, self.lift = layer.codebook, layer.lift
        self.register_buffer(
            "codes", pack_bits(nearest(layer.vectors.detach(), layer.codebook.detach()), self.bits)
        )

    @property
    def stored_bits(self) -> int:
        """Bits of codes, codebook and map; codes fill whole bytes."""
        floats = self.codebook.numel() + (0 if self.lift is None else self.lift.numel())
        return 8 * math.ceil(self.count * self.bits / 8) + 32 * floats

    def weight(self) -> Tensor:
        """Return the weight that the codes stand for."""
        rows = self.codebook[unpack_bits(self.codes, self.bits, (self.count,))]
        return _joined(rows if self.lift is None else rows @ self.lift, self.shape)


def low_rank(
    model: M, size: int = 8, rank: int | None = None, *, k: int = 16, layers: Sequence[str] | None = None
) -> tuple[M, CompressionReport]:
    """Replace layers by `LowRankLayer`, the first step of `lr2vq`, to be trained then.

    Args:
        model: any module; it stays as it is.
        size: m, weights in a subvector.
        rank: of the representations; by default each layer's `estimate_rank`.
        k: entries of the codebook to come, for the estimate.
        layers: names of convolutions and linear layers; by default all but the first and the last one that have at
            least 2 k subvectors.

    Raises:
        ValueError: if `layers` names none.
    """
    result: Any = copy.deepcopy(model)
    found = {
        name: m
        for name, m in weight_layers(result).items()
        if not isinstance(m, nn.modules.conv._ConvTransposeNd)
    }
    for name in layers or ():
        if name not in found:
            raise ValueError(
                f"layers: {name!r} is no convolution or linear layer{closest(name, list(found))}"
            )
    if layers is None:
        layers = [name for name in list(found)[1:-1] if found[name].weight.numel() >= 2 * k * size]
    notes = []
    for name in layers:
        weight = found[name].weight.detach()
        new = LowRankLayer(found[name], size, rank or estimate_rank(weight, size, k)).train(
            found[name].training
        )
        error = float((new.weight().detach() - weight).norm() / weight.norm())
        notes.append(f"{name}: rank {new.vectors.shape[1]} of {size}, relative error {error:.2g}.")
        if name:
            result.set_submodule(name, new)
        else:
            result = new
    return result, compare("low-rank representations", model, result, notes=tuple(notes))


def quantize_codes(model: M) -> tuple[M, CompressionReport]:
    """Replace every `LowRankLayer` with a codebook by a `VectorQuantizedLayer`, the last step of `lr2vq`."""
    result: Any = copy.deepcopy(model)
    notes = []
    for name, layer in list(result.named_modules()):
        if isinstance(layer, LowRankLayer) and layer.codebook is not None:
            new = VectorQuantizedLayer(layer).train(layer.training)
            weights = math.prod(new.shape)
            notes.append(
                f"{name}: {new.stored_bits / weights:.2f} bits a weight, {32 * weights / new.stored_bits:.1f}x."
            )
            if name:
                result.set_submodule(name, new)
            else:
                result = new
    return result, compare("vector quantization", model, result, notes=tuple(notes))


def lr2vq(
    model: M,
    size: int = 8,
    k: int = 16,
    rank: int | None = None,
    *,
    train: Callable[[nn.Module], object] | None = None,
    layers: Sequence[str] | None = None,
) -> tuple[M, CompressionReport]:
    r"""Compress layers to codes of :math:`\log_2 k` bits for m weights (`LR2VQ <https://arxiv.org/abs/2211.11397>`_).

    Weights become low-rank representations and are trained; these are clustered and trained with soft codes; codes are
    fixed, and codebooks are trained.

    Args:
        model: any module; it stays as it is. Call again on the result for layers with other settings.
        size: m, weights in a subvector.
        k: entries of a codebook.
        rank: of the representations, at m plain vector quantization; by default each layer's `estimate_rank`.
        train: trains a model in place for a while, after each of the three steps; without it nothing is trained.
        layers: names of convolutions and linear layers; by default all but the first and the last one that have at
            least 2 k subvectors.

    Returns:
        The copy, and the report, whose notes give every layer's bits.

    Raises:
        ValueError: if `layers` names none, or `rank` is more than `size`.
    """
    result, _ = low_rank(model, size, rank, k=k, layers=layers)
    if train is not None:
        train(result)
    for layer in result.modules():
        if isinstance(layer, LowRankLayer):
            layer.cluster(k)
    if train is not None:
        train(result)
    result, report = quantize_codes(result)
    if train is not None:
        train(result)
    return result, compare("LR2VQ", model, result, notes=report.notes)
