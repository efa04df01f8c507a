"""Follow every element of every tensor through one forward pass, to learn what must be removed together.

A tensor in flight carries a tensor of labels of its own shape. A positive label is a unit: an output of a layer, which
exists or does not. A negative one says which element of which parameter stands there. Zero is anything else. What
moves data (views, permutations, slices, concatenation) is simply run on the labels; what works element by element ties
the labels that meet; convolutions and matrix products give their outputs new labels and note which slices of their
weights belong to which unit. So there is no rule for a kind of module, and none for a kind of network.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from omniconv.compress.structure.labels import FIXED, Ties, compact, varying
from omniconv.compress.structure.rules import Rules

__all__ = ["Cut", "Product", "Trace", "View"]

# What moves data and computes nothing; run on the labels as it is.
_MOVES = frozenset(
    "view _unsafe_view reshape _reshape_alias expand permute transpose t squeeze unsqueeze slice select split unbind "
    "cat split_with_sizes stack clone detach alias roll flip constant_pad_nd repeat pixel_shuffle pixel_unshuffle "
    "channel_shuffle narrow unfold diagonal im2col lift_fresh repeat_interleave".split()
)
_COPIES = frozenset(
    ("_to_copy", "contiguous", "to", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like")
)
_FACTORIES = frozenset(
    "new_zeros new_ones new_empty new_full zeros ones empty full arange scalar_tensor eye linspace rand randn".split()
)
_REDUCTIONS = frozenset(
    "mean sum amax amin max min argmax argmin var std prod norm linalg_vector_norm logsumexp any all var_mean".split()
)
_NORMS = frozenset(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm".split()
)


@dataclass(frozen=True)
class View:
    """A view that `module` asked for; the new sizes follow from the labels of its result."""

    module: str
    labels: Tensor


@dataclass(frozen=True)
class Cut:
    """A dimension that `module` cut at given places: labels along it, and the places."""

    module: str
    labels: Tensor
    places: tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product, whose multiply-adds are one for each element of `labels` and each of `inner`.

    Attributes:
        labels: of the result; of what a transposed convolution reads.
        inner: of what is summed over, along the first dimension.
        times: multiply-adds for each pair of them, as taps of a kernel.
    """

    labels: Tensor
    inner: Tensor
    times: int


class Trace(TorchDispatchMode):
    """Labels everything while a module runs under it; see the module.

    Args:
        model: the module; run it on the meta device, in eval mode, with a batch of one.
        x: its input, whose channels are given from outside.

    Attributes:
        ties: what was learned.
        starts: where the elements of each parameter and buffer begin in the count of all elements.
        views, cuts: what modules asked for with sizes that may be their attributes.
        products: what costs multiply-adds.
        outputs: labels of what each module returned last, where that is a tensor.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.ties = Ties()
        self.starts: dict[str, int] = {}
        self.views: list[View] = []
        self.cuts: list[Cut] = []
        self.products: list[Product] = []
        self.outputs: dict[str, Tensor] = {}
        self._labels: Any = WeakTensorKeyDictionary()
        self._parameters: Any = WeakTensorKeyDictionary()
        self._running: list[str] = []
        self._hooks: list[Any] = []
        self._labels[x] = torch.tensor(FIXED).expand(x.shape)
        start = 1
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.starts[name], self._parameters[tensor] = start, start
            start += tensor.numel()
        for name, module in model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(functools.partial(self._enter, name)))
            self._hooks.append(module.register_forward_hook(self._leave))

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave(self, _module: Any, _inputs: Any, output: Any) -> None:
        name = self._running.pop()
        if isinstance(output, Tensor) and output in self._labels:
            self.outputs[name] = self._labels[output]

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def of(self, tensor: Tensor) -> Tensor:
        """Return the labels of a tensor."""
        if tensor in self._labels:
            return self._labels[tensor]
        if tensor in self._parameters:
            start = self._parameters[tensor]
            return -torch.arange(start, start + tensor.numel()).reshape(tensor.shape)
        return torch.zeros((), dtype=torch.long).expand(tensor.shape)

    def fix(self, tensors: Any) -> None:
        """Keep every unit in these tensors from being removed."""
        for tensor in tree_flatten(tensors)[0]:
            if isinstance(tensor, Tensor):
                self.ties.fix(compact(self.of(tensor)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and its rule on the labels."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        plain = name if hasattr(Rules, name) else name.rstrip("_") if not name.startswith("_") else name
        results = self._rule(func, plain, args, kwargs, out)
        outputs, labels = tree_flatten(out)[0], tree_flatten(results)[0]
        if len(labels) == 1:
            labels = labels * len(outputs)
        for tensor, given in zip(outputs, labels, strict=False):
            if isinstance(tensor, Tensor) and given is not None:
                self._labels[tensor] = given if given.shape == tensor.shape else self._lost(tensor, given)
        return out

    def _lost(self, tensor: Tensor, labels: Tensor) -> Tensor:
        self.ties.fix(labels)
        return torch.tensor(FIXED).expand(tensor.shape)

    def _rule(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Any:
        rules = Rules(self.ties, out)
        labelled = tree_map(lambda a: self.of(a) if isinstance(a, Tensor) else a, (args, kwargs))
        values, named = labelled
        module = self._running[-1] if self._running else ""
        if name in _NORMS or name.startswith("native_"):
            self.views.append(View(module, compact(values[0])))
        if hasattr(rules, name):
            result = getattr(rules, name)(*values, **named)
            self._count(name, values, result, out)
            return result
        if name in _NORMS:
            return rules.batch_norm(*values)
        if name.startswith("_scaled_dot_product"):
            return rules.attention(*values[:3])
        if name in _COPIES:
            return values[0]
        if name in _FACTORIES:
            # Stored in full, for what is written into views of it.
            return torch.zeros(out.shape, dtype=torch.long)
        if name in _REDUCTIONS:
            place = 2 if "norm" in name else 1
            return rules.reduction(values[0], values[place] if len(values) > place else named.get("dim"))
        if name in _MOVES:
            return self._move(func, name, module, values, named, out)
        if torch.Tag.pointwise in func.tags:
            tensors = [v for v in tree_flatten(labelled)[0] if isinstance(v, Tensor)]
            return rules.pointwise(*tensors)
        return rules.other([v for v in tree_flatten(labelled)[0] if isinstance(v, Tensor)], out)

    def _count(self, name: str, values: Any, result: Any, out: Any) -> None:
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a = values[-2]
            # Of several products (heads), those that are left are whole.
            whole = a.ndim == 3 and 0 in varying(a)
            inner = a.flatten(0, -2).max(0).values * (0 if whole else 1)
            self.products.append(Product(compact(result), inner, 1))
        elif name == "convolution":
            x, weight, transposed, groups = values[0], values[1], values[6], values[8]
            taps = math.prod(weight.shape[2:]) * (weight.size(1) if groups > 1 else 1)
            written, read = (x, result) if transposed else (result, x)
            inner = compact(read[0]) if groups == 1 else torch.zeros(1, dtype=torch.long)
            self.products.append(Product(compact(written), inner, taps))

    def _move(self, func: Any, name: str, module: str, values: Any, named: Any, out: Any) -> Any:
        if name in ("view", "reshape", "_unsafe_view"):
            moved = values[0].reshape(out.shape)
            self.views.append(View(module, compact(moved)))
            return moved
        if name == "clone":
            return values[0]
        if name in ("unbind", "select", "split"):
            # Equal parts stay equal: what is removed from one is removed from all.
            dim = values[2 if name == "split" else 1] if len(values) > (2 if name == "split" else 1) else 0
            size = values[1] if name == "split" else 1
            parts = values[0].split(size, dim)
            for part in parts[1:]:
                if part.shape == parts[0].shape:
                    self.ties.tie(compact(parts[0]), compact(part))
        if name in ("split", "split_with_sizes", "slice"):
            self._note_cuts(name, module, values)
        if name == "stack":
            for other in values[0][1:]:
                self.ties.tie(compact(values[0][0]), compact(other))
        if name == "constant_pad_nd":
            return func(*values[:2])
        if name == "im2col":
            return func(values[0].double(), *values[1:], **named).long()
        named = {key: value for key, value in named.items() if key != "memory_format"}
        return func(*values, **named)

    def _note_cuts(self, name: str, module: str, values: Any) -> None:
        labels, rest = values[0], values[1:]
        if name.startswith("split"):
            dim = rest[1] if len(rest) > 1 else 0
            size = labels.size(dim)
            sizes = (
                rest[0] if name == "split_with_sizes" else [rest[0]] * (size // rest[0]) + [size % rest[0]]
            )
            places = tuple(torch.tensor(sizes).cumsum(0).tolist())
        else:
            dim = rest[0] if rest else 0
            size = labels.size(dim)
            places = tuple(
                min(max(p if p >= 0 else p + size, 0), size) for p in rest[1:3] if isinstance(p, int)
            )
        dim %= labels.ndim
        if dim in varying(labels):
            first = labels.movedim(dim, 0).flatten(1)[:, 0]
            self.cuts.append(Cut(module, first, places))
