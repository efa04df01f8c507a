"""DRESS: nested sparse subnets of one network, between which a device switches without copying a weight.

Paper: Qu et al., DRESS: Dynamic REal-time Sparse Subnets, https://arxiv.org/abs/2207.00670. Start from a trained
network; train all subnets on the same batches while `resample` follows the magnitudes, `fix` the masks, train on,
`recalibrate` the norms. Then `packed_rows` stores each weight once, and subnet k reads the first rows of it.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from omniconv.compress.prune.masks import prunable_weights

__all__ = ["PackedRows", "SparseSubnets", "pack_rows", "row_levels"]

M = TypeVar("M", bound=nn.Module)


def row_levels(weight: Tensor, sparsities: Sequence[float]) -> Tensor:
    """Return how many subnets keep each entry of a weight (out, in, ...), uint8.

    Each keeps the largest entries of a row, as many in every row, at least one.

    Args:
        weight: of a convolution or linear layer.
        sparsities: of the subnets, rising.
    """
    order = weight.detach().flatten(1).abs().sort(dim=1, descending=True, stable=True).indices
    levels = torch.zeros_like(order, dtype=torch.uint8)
    for sparsity in sparsities:
        count = max(1, round((1 - sparsity) * order.shape[1]))
        levels.scatter_(1, order[:, :count], 1, reduce="add")
    return levels.reshape(weight.shape)


@dataclass(frozen=True)
class PackedRows:
    """One weight in the paper's row format: as many entries in each row, those of the sparsest subnet first.

    Attributes:
        values: (entries, rows), of the densest subnet.
        columns: (entries, rows), where in its row a value stands; of the smallest dtype that can hold it.
        counts: entries of each row by subnet, the densest first.
        shape: of the weight.
    """

    values: Tensor
    columns: Tensor
    counts: tuple[int, ...]
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes of values and columns."""
        return self.values.nbytes + self.columns.nbytes

    def prefix(self, subnet: int) -> tuple[Tensor, Tensor]:
        """Return the values and columns of a subnet, views into this."""
        count = self.counts[subnet]
        return self.values[:count], self.columns[:count]

    def dense(self, subnet: int) -> Tensor:
        """Return the weight of a subnet with its zeros."""
        values, columns = self.prefix(subnet)
        rows = values.new_zeros(self.shape[0], self.shape[1:].numel())
        return rows.scatter_(1, columns.T.long(), values.T).reshape(self.shape)

    def matmul(self, x: Tensor, subnet: int) -> Tensor:
        """Return x (..., columns) times the transposed rows of a subnet, (..., rows)."""
        values, columns = self.prefix(subnet)
        return (x[..., columns.long()] * values).sum(-2)


def pack_rows(weight: Tensor, levels: Tensor) -> PackedRows:
    """Store the weights (out, in, ...) of nested subnets once.

    Args:
        weight: of a convolution or linear layer.
        levels: how many subnets keep each entry, as `row_levels` returns.
    """
    rows, kept = weight.detach().flatten(1), levels.flatten(1)
    counts = [int((kept[0] > k).sum()) for k in range(int(kept.max()))]
    columns = kept.sort(dim=1, descending=True, stable=True).indices[:, : counts[0]]
    index = next(
        dtype
        for dtype in (torch.uint8, torch.int16, torch.int32)
        if rows.shape[1] - 1 <= torch.iinfo(dtype).max
    )
    values = rows.gather(1, columns).T.contiguous()
    return PackedRows(values, columns.T.to(index).contiguous(), tuple(counts), weight.shape)


class SparseSubnets(nn.Module, Generic[M]):
    r"""Nested sparse subnets in one network (`DRESS <https://arxiv.org/abs/2207.00670>`_).

    .. math:: \min_w \sum_k \pi_k L(w \odot m_k), \qquad m_1 \ge m_2 \ge \dots

    Each row of a weight, all that goes into one output, keeps as many weights as any other, its largest; each
    subnet has batch norms of its own. While masks are resampled, gradients pass them straight through, so that a
    weight can come back.

    Args:
        model: a trained network; it is copied.
        sparsities: of the subnets, rising.

    Raises:
        ValueError: if the sparsities do not rise within [0, 1), or the model has nothing to prune.

    Shapes:
        As of the model; without the number of a subnet, the outputs of all are stacked in a first dimension.
    """

    def __init__(self, model: M, sparsities: Sequence[float] = (0.8, 0.9, 0.95)) -> None:
        super().__init__()
        if (
            not sparsities
            or list(sparsities) != sorted(set(sparsities))
            or not 0 <= sparsities[0] <= sparsities[-1] < 1
        ):
            raise ValueError(f"sparsities must rise within [0, 1): got {tuple(sparsities)}")
        self.model = copy.deepcopy(model)
        self.sparsities = tuple(sparsities)
        norms = {name: m for name, m in self.model.named_modules() if isinstance(m, _BatchNorm)}
        self._norm_names = list(norms)
        # The densest subnet uses the model's own.
        self.norms = nn.ModuleList(
            nn.ModuleList(copy.deepcopy(norm) for norm in norms.values()) for _ in sparsities[1:]
        )
        self.fixed = False
        self._layers = list(prunable_weights(self.model))
        for index, name in enumerate(self._layers):
            weight = self.model.get_submodule(name).get_parameter("weight")
            self.register_buffer(f"levels{index}", row_levels(weight, sparsities))

    def _weights(self) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """Return each weight and how many subnets keep its entries, by layer."""
        return {
            name: (self.model.get_submodule(name).get_parameter("weight"), self.get_buffer(f"levels{index}"))
            for index, name in enumerate(self._layers)
        }

    def masks(self, subnet: int) -> dict[str, Tensor]:
        """Return which weights a subnet keeps, by layer."""
        return {name: levels > subnet for name, (_, levels) in self._weights().items()}

    @torch.no_grad()
    def resample(self) -> None:
        """Choose the masks anew from the magnitudes of now, unless they are fixed."""
        if not self.fixed:
            for weight, levels in self._weights().values():
                levels.copy_(row_levels(weight, self.sparsities))

    def fix(self) -> None:
        """Keep the masks from now on; gradients then reach only the weights that a subnet uses."""
        self.fixed = True

    def _state(self, subnet: int) -> dict[str, Tensor]:
        state = {}
        for name, (weight, levels) in self._weights().items():
            used = weight * (levels > subnet)
            state[f"{name}.weight"] = used if self.fixed else weight + (used - weight).detach()
        if subnet:
            copies = self.norms[subnet - 1]
            assert isinstance(copies, nn.ModuleList)
            for name, norm in zip(self._norm_names, copies, strict=True):
                state |= {f"{name}.{key}": value for key, value in norm.named_parameters()}
                state |= {f"{name}.{key}": value for key, value in norm.named_buffers()}
        return state

    def forward(self, x: Tensor, subnet: int | None = None) -> Tensor:
        """Return the output of one subnet, 0 being the densest, or of all (subnets, N, ...)."""
        if subnet is None:
            return torch.stack([self(x, k) for k in range(len(self.sparsities))])
        return functional_call(self.model, self._state(subnet), (x,))

    @torch.no_grad()
    def recalibrate(self, batches: Iterable[Tensor]) -> None:
        """Measure the statistics of every subnet's batch norms anew, as plain means over the batches.

        Args:
            batches: inputs.
        """
        modes = {module: module.training for module in self.modules()}
        momenta = {module: module.momentum for module in modes if isinstance(module, _BatchNorm)}
        self.eval()
        for norm in momenta:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for x in batches:
            self(x)
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training

    def extract(self, subnet: int) -> M:
        """Return one subnet as a plain model with zeros and its own norms."""
        plain = copy.deepcopy(self.model)
        plain.load_state_dict({**plain.state_dict(), **self._state(subnet)})
        return plain

    def packed_rows(self) -> dict[str, PackedRows]:
        """Return the weights of all subnets, each stored once, by layer."""
        return {name: pack_rows(weight, levels) for name, (weight, levels) in self._weights().items()}

    def packed_state(self) -> dict[str, Tensor]:
        """Return all that a device stores: rows and columns of weights, one set of norms a subnet, the rest once."""
        packed = self.packed_rows()
        state = {
            f"{name}.{key}": getattr(rows, key)
            for name, rows in packed.items()
            for key in ("values", "columns")
        }
        weights = {f"{name}.weight" for name in packed}
        state |= {
            f"model.{key}": value for key, value in self.model.state_dict().items() if key not in weights
        }
        return state | {f"norms.{key}": value for key, value in self.norms.state_dict().items()}
