"""Operators registered for the layouts here; all others are computed dense."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.sparse.base import call, register_operator
from omniconv.ops.sparse.grouped_nm import grouped_nm_matmul
from omniconv.ops.sparse.layouts import COO, CSR, GroupedNM, Masked
from omniconv.ops.sparse.sparsifiers import KeepAll, Sparsifier, sparsify

__all__: list[str] = []


@register_operator(torch.matmul, (COO,))
def _matmul_coo(a: COO, b: Tensor) -> Any:
    if a.ndim != 2 or b.ndim != 2:
        return NotImplemented
    # The entries are unique and in order by construction.
    matrix = torch.sparse_coo_tensor(a.indices, a.values, a.shape, is_coalesced=True, check_invariants=False)
    return torch.sparse.mm(matrix, b)


@register_operator(torch.matmul, (CSR,))
def _matmul_csr(a: CSR, b: Tensor) -> Any:
    return _matmul_coo(COO(a.values, torch.stack((a.rows, a.columns)), a.shape), b)


@register_operator(torch.matmul, (GroupedNM,))
def _matmul_grouped(a: GroupedNM, b: Tensor) -> Any:
    if b.ndim != 2:
        return NotImplemented
    return grouped_nm_matmul(a.values, a.rows, b, n=a.values.shape[4], m=a.m)[: a.shape[0]]


@register_operator(F.linear, (Tensor, COO))
@register_operator(F.linear, (Tensor, CSR))
@register_operator(F.linear, (Tensor, GroupedNM))
def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    y = call(torch.matmul, weight, x.flatten(0, -2).T if x.ndim > 1 else x[:, None]).T
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


@register_operator(F.conv2d, (Tensor, GroupedNM))
def _conv2d(
    x: Tensor, weight: GroupedNM, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups: int = 1
) -> Any:
    if isinstance(padding, str) or groups > 1 or x.ndim != 4:
        return NotImplemented
    size = weight.shape[2:]
    columns = F.unfold(x, size, dilation, padding, stride)
    y = call(torch.matmul, weight, columns.transpose(0, 1).flatten(1)).unflatten(1, (x.shape[0], -1))
    pair = [(v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation)]
    height, width = (
        (have + 2 * p - d * (k - 1) - 1) // s + 1
        for have, k, s, p, d in zip(x.shape[2:], size, *pair, strict=True)
    )
    y = y.transpose(0, 1).unflatten(2, (height, width))
    return y if bias is None else y + bias[:, None, None]


@register_operator(torch.matmul, (Masked,))
def _matmul_masked(a: Masked, b: Tensor) -> Tensor:
    return a.dense() @ b


@register_operator(F.linear, (Tensor, Masked))
def _linear_masked(x: Tensor, weight: Masked, *others: Any, **more: Any) -> Tensor:
    return F.linear(x, weight.dense(), *others, **more)


@register_operator(F.conv2d, (Tensor, Masked))
def _conv2d_masked(x: Tensor, weight: Masked, *others: Any, **more: Any) -> Tensor:
    return F.conv2d(x, weight.dense(), *others, **more)


@register_operator(torch.add, (Masked, Masked), Masked)
def _add_masked(a: Masked, b: Masked, inline: Sparsifier) -> Masked:
    total = Masked(a.dense() + b.dense(), a.kept | b.kept, a.shape)
    return total if isinstance(inline, KeepAll) else sparsify(total, inline, Masked)
