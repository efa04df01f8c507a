"""What a transform did to a model, in the same figures for every transform.

A transform is called as `transform(model, ...)`, leaves its input as it is and returns a changed copy and a
`CompressionReport`.
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from omniconv.core.packing import stored_bytes
from omniconv.design.cost import count_cost, layer_macs

__all__ = ["CompressionReport", "LayerSize", "ModelSize", "compare", "weight_layers"]


def weight_layers(model: nn.Module) -> dict[str, nn.modules.conv._ConvNd | nn.Linear]:
    """Return the convolutions and linear layers of `model` by name, each once."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@dataclass(frozen=True)
class LayerSize:
    """The weight of one convolution or linear layer.

    Attributes:
        name: of the module.
        weights: entries of its weight.
        nonzero: those that are not zero.
        macs: multiply-adds of the layer for one sample, zeros included; None where unknown.
    """

    name: str
    weights: int
    nonzero: int
    macs: int | None = None

    @property
    def density(self) -> float:
        """Share of weights that are not zero."""
        return self.nonzero / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class ModelSize:
    """How large a model is.

    Attributes:
        parameters: entries of all parameters.
        nonzero: those that are not zero.
        macs: multiply-adds of one sample, zeros included; None where unknown.
        sparse_macs: multiply-adds of one sample without those whose weight is zero; None where unknown.
        bytes: of all parameters and buffers in a weight file, each plain or packed (`save_sparse`),
            whichever is smaller; None where unknown.
    """

    parameters: int
    nonzero: int
    macs: int | None = None
    sparse_macs: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class CompressionReport:
    """What a transform did.

    Attributes:
        method: name of the transform.
        before, after: the model's size.
        layers: the convolutions and linear layers of the new model.
        notes: what a reader should know, one sentence each.
    """

    method: str
    before: ModelSize
    after: ModelSize
    layers: tuple[LayerSize, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Return the figures before and after, the layers and the notes as text."""
        rows = [("", "before", "after", "ratio")]
        for label, field in (
            ("parameters", "parameters"),
            ("not zero", "nonzero"),
            ("multiply-adds", "macs"),
            ("without zeros", "sparse_macs"),
            ("bytes", "bytes"),
        ):
            old, new = getattr(self.before, field), getattr(self.after, field)
            if old is not None and new is not None:
                rows.append((label, f"{old:,}", f"{new:,}", f"{old / new:.2f}x" if new else "-"))
        parts = [self.method, _columns(rows)]
        if self.layers:
            layers = [("layer", "weights", "not zero", "density")]
            layers += [(x.name, f"{x.weights:,}", f"{x.nonzero:,}", f"{x.density:.2%}") for x in self.layers]
            parts.append(_columns(layers))
        return "\n\n".join([*parts, *self.notes])

    def __str__(self) -> str:
        return self.table()


def _columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _layers(model: nn.Module, input_shape: tuple[int, ...] | None) -> tuple[LayerSize, ...]:
    macs = {} if input_shape is None else layer_macs(model, input_shape)
    sizes = []
    for name, module in weight_layers(model).items():
        weight = module.weight
        sizes.append(LayerSize(name, weight.numel(), int(weight.count_nonzero()), macs.get(name)))
    return tuple(sizes)


def _size(model: nn.Module, layers: tuple[LayerSize, ...], input_shape: tuple[int, ...] | None) -> ModelSize:
    macs = sparse = None
    if input_shape is not None:
        macs = count_cost(model, input_shape).macs
        sparse = macs - sum(round(layer.macs * (1 - layer.density)) for layer in layers if layer.macs)
    return ModelSize(
        sum(p.numel() for p in model.parameters()),
        sum(int(p.count_nonzero()) for p in model.parameters()),
        macs,
        sparse,
        sum(stored_bytes(tensor) for tensor in model.state_dict().values()),
    )


def compare(
    method: str,
    before: nn.Module,
    after: nn.Module,
    *,
    input_shape: tuple[int, ...] | None = None,
    notes: tuple[str, ...] = (),
) -> CompressionReport:
    """Measure two models and return the report.

    Args:
        method: name of the transform.
        before: the model that went in.
        after: the model that came out.
        input_shape: of one sample, for example (3, 224, 224); without it multiply-adds stay unknown.
        notes: what a reader should know.
    """
    layers = _layers(after, input_shape)
    old = _size(before, _layers(before, input_shape), input_shape)
    return CompressionReport(method, old, _size(after, layers, input_shape), layers, notes)
