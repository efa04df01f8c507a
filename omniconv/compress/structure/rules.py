"""What operations that compute do to labels; those that only move data are run on the labels, see `trace`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from omniconv.compress.structure.labels import FIXED, Ties, compact, thin, varying

__all__ = ["Rules"]


class Rules:
    """What happens to labels in operations that compute; a method is called as its operation is."""

    def __init__(self, ties: Ties, out: Any) -> None:
        self.ties = ties
        self.out = out

    def pointwise(self, *operands: Tensor) -> Tensor:
        """Elements that meet go together."""
        shape = torch.broadcast_shapes(*(o.shape for o in operands))
        expanded = [o.expand(shape) for o in operands]
        same = [d for d in range(len(shape)) if all(e.stride(d) == 0 or shape[d] == 1 for e in expanded)]
        parts = [thin(e, same) if math.prod(shape) else e for e in expanded]
        result = parts[0]
        for part, operand in zip(parts[1:], operands[1:], strict=True):
            if self._spreads(part, result):
                self.ties.shared.append((part.expand(result.shape), result))
                continue
            if self._spreads(result, part):
                self.ties.shared.append((result.expand(part.shape), part))
                result = torch.where(part > 0, part, result)
                continue
            self.ties.tie(result, part)
            both = (result < 0) & (part < 0)
            if both.any():
                self._follow(result, part)
            if bool((part == 0).all()):
                continue
            better = (part > 0) | ((result == 0) & (part != 0))
            if operand.numel() > operands[0].numel():
                better |= both
            result = torch.where(better & (result <= 0), part, result)
        return result.expand(shape)

    def _spreads(self, small: Tensor, big: Tensor) -> bool:
        """Whether `small`, which has units, is stretched along a dimension in which `big` has different ones."""
        if not bool(((small > 0) & (big > 0)).any()):
            return False
        stretched = [d for d in varying(big) if not small.stride(d) and d not in varying(small)]
        # Parameters among the units, such as a class token beside patches, are no other units.
        highest, lowest = big.clamp(min=0), torch.where(big > 0, big, torch.iinfo(big.dtype).max)
        return any(
            bool(((h := highest.amax(d)) > lowest.amin(d)).logical_and(h > 0).any()) for d in stretched
        )

    def _follow(self, a: Tensor, b: Tensor) -> None:
        """Let a parameter that scales or shifts rows of another one go with those rows."""
        small, big = (a, b) if _entries(a) < _entries(b) else (b, a)
        rest = set(range(small.ndim)) - set(varying(small))
        first = thin(big, rest)
        last = big
        for d in rest:
            last = last.narrow(d, last.size(d) - 1, 1)
        few = thin(small, rest)
        met = (few < 0) & (first < 0) & (last < 0)
        self.ties.follows.append((few[met], first[met], last[met]))

    def channels(self, x: Tensor, dim: int) -> Tensor:
        """Return one label for each index of a dimension, all other elements at it tied to it."""
        rows = thin(x, [d for d in range(x.ndim) if d != dim and x.stride(d) == 0])
        rows = rows.movedim(dim, 0).flatten(1)
        found = rows.max(1).values.clamp(min=0)
        missing = (found == 0) & (rows < 0).any(1)
        if missing.any():
            found[missing] = self.ties.fresh(int(missing.sum()))
        self.ties.tie(rows, found[:, None])
        return found

    def product(self, x: Tensor, dim: int, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return the new labels (O,) of a product over dimension `dim` of `x` with a weight (O, K, ...).

        None if `x` carries its labels along other dimensions, which the product leaves as they are.
        """
        vary = varying(x)
        if vary and x.max() > FIXED and (dim not in vary or self._carried_by_rows(x, dim)):
            self.ties.fix(weight[weight > 0])
            return None
        if not bool((weight < 0).all()):
            # Weights computed from the input have no slices of their own to remove.
            self.ties.fix(compact(x))
            self.ties.fix(compact(weight))
            return torch.tensor(FIXED if weight.any() else 0).expand(weight.size(0))
        units = self.channels(x, dim)
        self._use(weight, 1, units)
        fresh = self.ties.fresh(weight.size(0))
        self._use(weight, 0, fresh)
        if bias is not None:
            self.ties.tie(bias, fresh)
        return fresh

    def _carried_by_rows(self, x: Tensor, dim: int) -> bool:
        """Whether fewer units meet along `dim` than along the other dimensions; those that meet go together."""
        rows = thin(x, [d for d in range(x.ndim) if d != dim and x.stride(d) == 0]).movedim(dim, 0).flatten(1)
        along, across = int(_distinct(rows.t()).max()), int(_distinct(rows).max())
        if along >= across:
            return False
        self.ties.tie(rows, rows.max(0).values)
        return True

    def _use(self, weight: Tensor, dim: int, units: Tensor) -> None:
        """Note that slices of a weight along `dim` belong to `units`; two lines stand for a slice."""
        others = [d for d in range(weight.ndim) if d != dim]
        first, last = weight, weight
        for d in others:
            first, last = first.narrow(d, 0, 1), last.narrow(d, last.size(d) - 1, 1)
        used = units > 0
        self.ties.uses.append(
            (torch.cat((first.flatten()[used], last.flatten()[used])), torch.cat((units[used], units[used])))
        )

    def convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Any,
        _s: Any,
        _p: Any,
        _d: Any,
        transposed: bool,
        _o: Any,
        groups: int,
    ) -> Tensor:
        """A convolution; whole groups go, so that a group keeps its width."""
        shape = self.out.shape
        spread = (1, -1, *[1] * (len(shape) - 2))
        if groups == shape[1] == x.size(1) and not bool(weight.any()):
            # A constant filter made for as many channels as there are.
            return self.carried(thin(x, range(2, x.ndim)), shape)
        if groups > 1 and bool((weight < 0).all()) and (1 in varying(x) or not varying(x)):
            units = self._grouped(x, weight, bias, transposed, groups)
            return units.view(spread).expand(shape)
        if groups > 1:
            self.ties.fix(compact(x))
            self.ties.fix(compact(weight))
            return torch.tensor(FIXED).expand(shape)
        units = self.product(x, 1, weight.transpose(0, 1) if transposed else weight, bias)
        if units is not None:
            return units.view(spread).expand(shape)
        return self.carried(thin(x, [1]), shape)

    def _grouped(self, x: Tensor, weight: Tensor, bias: Any, transposed: bool, groups: int) -> Tensor:
        found = self.channels(x, 1)
        rows = found.view(groups, -1)
        each = rows.max(1).values
        missing = each == 0
        if missing.any():
            each[missing] = self.ties.fresh(int(missing.sum()))
        self.ties.tie(rows, each[:, None])
        outputs = self.out.shape[1]
        units = each.repeat_interleave(outputs // groups)
        self._use(weight, 0, each.repeat_interleave(x.size(1) // groups) if transposed else units)
        if bias is not None:
            self.ties.tie(bias, units)
        return units

    def carried(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Return labels for a result of another shape that keeps every dimension along which labels vary."""
        if len(shape) == x.ndim and not bool((x > 0).any()):
            # Of a parameter that is resampled, rows stay rows.
            x = thin(x, [d for d in range(x.ndim) if shape[d] != x.size(d)])
        vary = varying(x)
        if len(shape) == x.ndim and all(shape[d] == x.size(d) for d in vary):
            return thin(x, set(range(x.ndim)) - set(vary)).expand(shape)
        self.ties.fix(compact(x))
        return torch.tensor(FIXED if vary or bool((x != 0).any()) else 0).expand(shape)

    def mm(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """A product of two matrices, of which one may be a parameter."""
        return self._products(a[None], b[None], bias)[0]

    def addmm(self, bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> Tensor:
        """A product of two matrices plus a bias."""
        return self.mm(a, b, bias)

    def bmm(self, a: Tensor, b: Tensor) -> Tensor:
        """Products of matrices."""
        return self._products(a, b, None)

    def baddbmm(self, bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> Tensor:
        """Products of matrices plus a bias."""
        return self.pointwise(self._products(a, b, None), bias)

    def _products(self, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        shape = (a.size(0), a.size(1), b.size(2))
        if _constant(b, 0) and bool((b < 0).any()):
            units = self.product(a, 2, b[0].t(), bias)
            return self.carried(thin(a, [2]), shape) if units is None else units.expand(shape)
        if _constant(a, 0) and bool((a < 0).any()):
            units = self.product(b, 1, a[0], None)
            return self.carried(thin(b, [1]), shape) if units is None else units[:, None].expand(shape)
        if 0 in varying(a) or 0 in varying(b):
            # One product a head (or an expert): it goes as a whole.
            whole = self.channels(torch.cat((a.flatten(1), b.flatten(1)), 1), 0)
            return self.pointwise(
                b[:, :1].expand(shape) if 2 in varying(b) else a[:, :, :1].expand(shape), whole[:, None, None]
            )
        inner, outer = (2 in varying(a) or 1 in varying(b)), (1 in varying(a), 2 in varying(b))
        if inner and not any(outer):
            self.pointwise(a[:, :1].transpose(1, 2), b[:, :, :1])
            return torch.zeros(shape, dtype=torch.long)
        if not inner and not all(outer):
            return b[:, :1].expand(shape) if outer[1] else a[:, :, :1].expand(shape)
        self.ties.fix(compact(a))
        self.ties.fix(compact(b))
        return torch.tensor(FIXED).expand(shape)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """Scaled dot products; heads (dimension 1) go as a whole if they carry labels, else features one by one."""
        shape = (*q.shape[:-1], v.shape[-1])
        queries, keys, values = (t.flatten(0, 1) for t in (q, k, v))
        scores = self._products(queries, keys.transpose(1, 2), None)
        result = self._products(scores, values, None).view(shape)
        return [result if i == 0 else None for i, _ in enumerate(tree_flatten(self.out)[0])] or result

    def batch_norm(self, x: Tensor, *vectors: Any) -> Any:
        """Statistics, scale and shift of every channel."""
        spread = (1, -1, *[1] * (x.ndim - 2))
        tensors = [v.reshape(spread) for v in vectors if isinstance(v, Tensor) and v.ndim == 1 and v.numel()]
        return [self.pointwise(x, *tensors), None, None, None]

    def native_layer_norm(self, x: Tensor, _shape: Any, weight: Any, bias: Any, _eps: Any) -> Any:
        """Scale and shift of every feature."""
        return [self.pointwise(x, *(v for v in (weight, bias) if v is not None)), None, None]

    def native_group_norm(
        self, x: Tensor, weight: Any, bias: Any, _n: int, channels: int, _hw: int, groups: int, _eps: Any
    ) -> Any:
        """Scale and shift of every channel; of several groups, whole ones go."""
        units = self.channels(x, 1)
        if groups > 1:
            self.ties.tie(units.view(groups, -1), units.view(groups, -1)[:, :1])
        for vector in (weight, bias):
            if vector is not None:
                self.ties.tie(vector, units)
        return [x, None, None]

    def reduction(self, x: Tensor, dims: Any) -> Any:
        """What is left of labels when dimensions vanish or shrink to one: those along the others."""
        dims = (
            [d % x.ndim for d in ([dims] if isinstance(dims, int) else dims or range(x.ndim))]
            if x.ndim
            else []
        )
        vary = varying(x)
        kept = thin(x, [d for d in range(x.ndim) if d in dims or d not in vary])
        if set(vary) & set(dims):
            kept = kept * 0 if set(vary) <= set(dims) else kept
        results = []
        for out in tree_flatten(self.out)[0]:
            results.append((kept if out.ndim == x.ndim else kept.squeeze(dims)).expand(out.shape))
        return results

    def copy(self, target: Tensor, source: Tensor, *_: Any) -> Tensor:
        """Written into place; a view of another tensor writes through."""
        source = source.expand(target.shape)
        if all(target.stride(d) or target.size(d) == 1 for d in range(target.ndim)):
            return target.copy_(source)
        return source

    def view_as_complex(self, x: Tensor) -> Tensor:
        """Pairs become numbers."""
        return x[..., 0]

    def view_as_real(self, x: Tensor) -> Tensor:
        """Numbers become pairs."""
        return x[..., None].expand(*x.shape, 2)

    def index(self, x: Tensor, indices: Any) -> Tensor:
        """A gather by indices that are not known here: what varies along the gathered dimensions is fixed."""
        gathered = [d for d, index in enumerate(indices) if index is not None]
        if set(gathered) & set(varying(x)) and bool((x > 0).any()):
            self.ties.fix(compact(x))
        kept = thin(x, gathered)
        sizes = torch.broadcast_shapes(*(index.shape for index in indices if index is not None))
        kept = kept.squeeze(gathered)
        for _ in sizes:
            kept = kept.unsqueeze(gathered[0])
        return kept.expand(self.out.shape)

    def index_select(self, x: Tensor, dim: int, index: Tensor) -> Tensor:
        """A gather along one dimension."""
        return self.index(x, [None] * (dim % x.ndim) + [index])

    def other(self, tensors: list[Tensor], out: Any) -> Any:
        """Anything else (pooling, resampling, Fourier transforms): a dimension that carries labels keeps its size."""
        outputs = tree_flatten(out)[0]
        for tensor in tensors[1:]:
            self.ties.fix(compact(tensor))
        if not tensors:
            return [
                torch.zeros((), dtype=torch.long).expand(o.shape) if isinstance(o, Tensor) else None
                for o in outputs
            ]
        return [self.carried(tensors[0], o.shape) if isinstance(o, Tensor) else None for o in outputs]


def _entries(x: Tensor) -> int:
    return math.prod(x.size(d) for d in varying(x))


def _distinct(rows: Tensor) -> Tensor:
    """Return how many different units there are in each row."""
    ordered = rows.clamp(min=0).sort(1).values
    return (ordered.diff(dim=1) != 0).sum(1) + (ordered[:, 0] > 0)


def _constant(x: Tensor, dim: int) -> bool:
    return dim not in varying(x)
