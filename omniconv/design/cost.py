"""What a network costs: parameters, multiply-adds, activations and memory traffic, counted without running it."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Cost", "LayerCost", "count_cost", "layer_costs", "layer_macs"]

_MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
# Parts of the names of torch's operators, and what they are called here; the first that fits counts.
_KINDS = {
    "attention": "attention", "norm": "norm", "pool": "pool", "mean": "pool", "amax": "pool", "upsample": "resize",
    "clone": "copy", "_to_copy": "copy", "copy": "copy", "cat": "copy", "pad": "copy", "index": "copy", "roll": "copy",
    "stack": "copy", "slice_backward": "copy", "softmax": "softmax",
}  # fmt: skip


@dataclass(frozen=True)
class LayerCost:
    """Cost of one operator in one forward pass of one sample.

    Attributes:
        name: of the module that calls it; "" for the network itself.
        op: torch's name of the operator.
        kind: "conv", "pointwise", "grouped", "depthwise", "linear", "matmul", "attention", "norm", "pool", "softmax",
            "resize", "copy" or "elementwise".
        macs: multiply-adds, of convolutions and matrix products.
        parameters: entries of parameters and buffers that it reads.
        inputs: entries of other tensors that it reads.
        outputs: entries that it writes.
        parameter_bytes, input_bytes, output_bytes: the memory traffic of these, each tensor moved once.
    """

    name: str
    op: str
    kind: str
    macs: int
    parameters: int
    inputs: int
    outputs: int
    parameter_bytes: int
    input_bytes: int
    output_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.parameter_bytes + self.input_bytes + self.output_bytes


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass of one sample.

    Attributes:
        parameters: trainable and frozen parameters; buffers do not count.
        macs: multiply-adds of convolutions and matrix products.
        activations: entries that convolutions and matrix products write.
        bytes: memory traffic, every operator reading and writing each of its tensors once.
    """

    parameters: int
    macs: int
    activations: int = 0
    bytes: int = 0


def _size(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Return entries and bytes."""
    tensors = list(tensors)
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


class _Recorder(FlopCounterMode):
    """Counts multiply-adds as torch does, and writes down every operator that moves data."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(display=False)
        self.root = type(model).__name__
        self.own = {self._storage(t) for t in [*model.parameters(), *model.buffers()]}
        self.rows: list[LayerCost] = []

    @staticmethod
    def _storage(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        before = sum(self.flop_counts["Global"].values())
        out = super()._count_flops(func_packet, out, args, kwargs)
        macs = (sum(self.flop_counts["Global"].values()) - before) // 2
        read = {(self._storage(t), t.shape): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        op = func_packet.__name__
        known = {storage for storage, _ in read}
        view = all(self._storage(t) in known for t in written) and not op.endswith("_")
        if not view and any(t.numel() for t in written):
            parameters, parameter_bytes = _size(t for (s, _), t in read.items() if s in self.own)
            inputs, input_bytes = _size(t for (s, _), t in read.items() if s not in self.own)
            outputs, output_bytes = _size(written)
            kind = _kind(op, args, macs, parameters)
            sizes = (parameters, inputs, outputs, parameter_bytes, input_bytes, output_bytes)
            self.rows.append(LayerCost(self._module(), op, kind, macs, *sizes))
        return out

    def _module(self) -> str:
        names = [name for name in self.mod_tracker.parents if name.startswith(f"{self.root}.")]
        return max(names, key=len, default="")[len(self.root) + 1 :]


def _kind(op: str, args: Any, macs: int, parameters: int) -> str:
    if op in ("convolution", "_convolution"):
        weight, groups = args[1], args[8]
        if groups == 1:
            return "conv" if math.prod(weight.shape[2:]) > 1 else "pointwise"
        return "depthwise" if weight.shape[1] == 1 else "grouped"
    if op in _MATRIX_PRODUCTS:
        return "linear" if parameters else "matmul"
    found = (kind for part, kind in _KINDS.items() if part in op)
    return next(found, "matmul" if macs else "elementwise")


def _record(model: nn.Module, input_shape: tuple[int, ...]) -> _Recorder:
    with torch.device("meta"):
        shadow = copy.deepcopy(model).to("meta").eval()
        x = torch.empty(1, *input_shape)
    recorder = _Recorder(shadow)
    with torch.no_grad(), recorder:
        shadow(x)
    return recorder


def count_cost(model: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """Count a model's cost on the meta device, so that it takes neither time nor memory.

    Args:
        model: any module; it is left untouched, in its mode and on its device.
        input_shape: of one sample, for example (3, 224, 224).
    """
    recorder = _record(model, input_shape)
    return Cost(
        sum(p.numel() for p in model.parameters()),
        recorder.get_total_flops() // 2,
        sum(row.outputs for row in recorder.rows if row.macs),
        sum(row.bytes for row in recorder.rows),
    )


def layer_costs(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[LayerCost, ...]:
    """Return the cost of every operator that moves data, in the order in which they run; views do not.

    Tensors that are computed from parameters on the way, such as standardised weights, count as inputs.
    """
    return tuple(_record(model, input_shape).rows)


def layer_macs(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Return the multiply-adds of every module that has any, by name, counted as `count_cost` does.

    A module's figure includes its children's; the model itself has the name "".
    """
    counts = _record(model, input_shape).get_flop_counts()
    root = type(model).__name__
    macs = {f"{name}.": sum(count.values()) // 2 for name, count in counts.items()}
    return {name[len(root) + 1 : -1]: n for name, n in macs.items() if name.startswith(f"{root}.")}
