"""Product of a matrix in the grouped n:m layout of `STen <https://arxiv.org/abs/2304.07613>`_ with a dense one."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.core.cases import OpCase, Raises
from omniconv.ops._numba import spread, unsupported
from omniconv.ops.dispatch import Implementation, Table, transformed

__all__ = ["assign", "grouped_nm_matmul", "patterns", "places", "to_matrix"]

_TILE = 512
"""Columns of a product at a time: a chunk's rows of so many should stay in the second cache."""


def patterns(n: int, m: int) -> list[tuple[int, ...]]:
    """Return the ways to choose n of m neighbours, in the order in which the layout has them."""
    return list(itertools.combinations(range(m), n))


def places(rows: Tensor, n: int, m: int) -> Tensor:
    """Return where each value stands in its flattened block (height, m) of a chunk.

    Shapes:
        - rows: (chunks, blocks, patterns, g)
        - output: (chunks, blocks, patterns, g, n)
    """
    columns = torch.tensor(patterns(n, m), device=rows.device)
    return rows[..., None] * m + columns[:, None, :]


def to_matrix(values: Tensor, rows: Tensor, n: int, m: int) -> Tensor:
    """Return the dense matrix (chunks x patterns x g, blocks x m)."""
    height = values.shape[2] * values.shape[3]
    index = places(rows, n, m).flatten(2)
    blocks = values.new_zeros(*values.shape[:2], height * m).scatter(2, index, values.flatten(2))
    return blocks.unflatten(2, (height, m)).transpose(1, 2).flatten(2).flatten(0, 1)


def assign(magnitudes: Tensor, n: int, g: int) -> Tensor:
    """Return the rows (chunks, blocks, patterns, g) that give each pattern g rows and keep the largest sum.

    Args:
        magnitudes: (chunks, blocks, height, m), with a height of binomial(m, n) g.
        n: kept of every m.
        g: rows of every pattern.
    """
    from scipy.optimize import linear_sum_assignment

    chosen = torch.tensor(patterns(n, magnitudes.shape[3]))
    # What a row keeps under each pattern: (chunks, blocks, height, patterns x g).
    kept = magnitudes.double().cpu()[..., chosen].sum(-1).repeat_interleave(g, -1)
    rows = [
        torch.from_numpy(linear_sum_assignment(block.T, maximize=True)[1])
        for block in kept.flatten(0, 1).numpy()
    ]
    shape = *magnitudes.shape[:2], len(chosen), g
    # Rows in ascending order within a pattern, which memory likes.
    return torch.stack(rows).reshape(shape).sort(-1).values.to(magnitudes.device)


def grouped_nm_matmul(
    values: Tensor, rows: Tensor, b: Tensor, *, n: int, m: int, impl: str = "auto"
) -> Tensor:
    r"""Multiply a matrix in grouped n:m layout with a dense one, from `STen <https://arxiv.org/abs/2304.07613>`_.

    .. math:: y_{c P g + r_{c,k,p,q},\, j} = \sum_k \sum_i v_{c,k,p,q,i}\, b_{k m + t_{p,i},\, j}

    where :math:`t_p` is the p-th of the :math:`P = \binom{m}{n}` ways to choose n of m numbers in ascending order.

    Args:
        values: v, what the matrix keeps.
        rows: r, which row of the chunk a value belongs to; for every c and k all rows of the chunk, each once.
        b: the dense matrix.
        n: entries kept of every m.
        m: neighbours of which n are kept.
        impl: which implementation; "auto" takes the fastest, see `omniconv.ops.explain`.

    Shapes:
        - values: (C, B, P, g, n)
        - rows: (C, B, P, g), int64
        - b: (K, N) with :math:`(B - 1) m < K \le B m`
        - output: (C P g, N)

    Raises:
        ValueError: if the shapes do not fit together.
    """
    call = _prepare(values, rows, b, n=n, m=m)
    return TABLE.select(impl, call).run(*call)


def _prepare(
    values: Tensor, rows: Tensor, b: Tensor, *, n: int, m: int
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    if values.ndim != 5 or values.shape[2] != math.comb(m, n) or values.shape[4] != n:
        raise ValueError(
            f"values must be (C, B, {math.comb(m, n)}, g, {n}) for {n}:{m}: got {tuple(values.shape)}"
        )
    if rows.shape != values.shape[:4] or rows.dtype != torch.int64:
        raise ValueError(
            f"rows must be int64 of shape {tuple(values.shape[:4])}: got {rows.dtype} {tuple(rows.shape)}"
        )
    if b.ndim != 2 or -(-b.shape[0] // m) != values.shape[1]:
        raise ValueError(f"b must have rows for {values.shape[1]} blocks of {m}: got {tuple(b.shape)}")
    return values, rows, b, n, m


def _reference(values: Tensor, rows: Tensor, b: Tensor, n: int, m: int) -> Tensor:
    chunks, blocks, count, g, _ = values.shape
    b = F.pad(b, (0, 0, 0, blocks * m - b.shape[0])).unflatten(0, (blocks, m))
    y = b.new_zeros(chunks, count * g, b.shape[2])
    for c, k, p, q in itertools.product(range(chunks), range(blocks), range(count), range(g)):
        row = sum(values[c, k, p, q, i] * b[k, t] for i, t in enumerate(patterns(n, m)[p]))
        y = y.index_put((torch.tensor(c), rows[c, k, p, q]), torch.as_tensor(row), accumulate=True)
    return y.flatten(0, 1)


def _run_torch(values: Tensor, rows: Tensor, b: Tensor, n: int, m: int) -> Tensor:
    return to_matrix(values, rows, n, m)[:, : b.shape[0]] @ b


def _products(values: Tensor, b: Tensor) -> int:
    return values.numel() * b.shape[1]


def _estimate_torch(values: Tensor, rows: Tensor, b: Tensor, n: int, m: int) -> float:
    entries = values.numel() // n * m
    return 5e-5 + 5e-9 * entries + entries * b.shape[1] / 5e10


@torch.library.custom_op("omniconv::grouped_nm_matmul", mutates_args=(), device_types="cpu")
def _multiply(values: Tensor, rows: Tensor, b: Tensor, n: int, m: int) -> Tensor:
    from omniconv.ops.sparse._grouped_nm_kernels import multiply

    height = values.shape[2] * values.shape[3]
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < height:
        raise ValueError(f"rows must lie in [0, {height}): got {int(rows.min())} to {int(rows.max())}")
    y = b.new_zeros(values.shape[0] * height, b.shape[1])
    columns = torch.tensor(patterns(n, m))
    pieces = values.shape[0] * -(-b.shape[1] // _TILE)
    spread(multiply, pieces, values.contiguous(), rows.contiguous(), columns, m, b.contiguous(), y, _TILE)
    return y


@_multiply.register_fake
def _(values, rows, b, n, m):
    return b.new_empty(values.shape[0] * values.shape[2] * values.shape[3], b.shape[1])


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.n, ctx.m = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, rows, b = ctx.saved_tensors
    of_values = of_b = None
    if ctx.needs_input_grad[0]:
        chunks, blocks, count, g, _ = values.shape
        outer = F.pad(grad @ b.T, (0, blocks * ctx.m - b.shape[0]))
        outer = outer.reshape(chunks, count * g, blocks, ctx.m).transpose(1, 2).flatten(2)
        of_values = outer.gather(2, places(rows, ctx.n, ctx.m).flatten(2)).reshape(values.shape)
    if ctx.needs_input_grad[2]:
        of_b = (to_matrix(values, rows, ctx.n, ctx.m).T @ grad)[: b.shape[0]]
    return of_values, None, of_b, None, None


_multiply.register_autograd(_backward, setup_context=_save)


def _supports(values: Tensor, rows: Tensor, b: Tensor, n: int, m: int) -> str | None:
    if reason := unsupported(values, b):
        return reason
    return "it knows no torch.func transform and no forward-mode gradient" if transformed() else None


def _estimate(values: Tensor, rows: Tensor, b: Tensor, n: int, m: int) -> float:
    return 1.5e-4 + _products(values, b) / 1e10


TABLE = Table(
    "grouped_nm_matmul",
    _prepare,
    _reference,
    (
        Implementation("torch", _run_torch, lambda *call: None, _estimate_torch),
        Implementation("compiled", _multiply, _supports, _estimate),
    ),
)


def _permutations(shape: Sequence[int], random: torch.Generator) -> Tensor:
    rows = torch.rand(*shape[:2], shape[2] * shape[3], generator=random).argsort(2)
    return rows.reshape(tuple(shape))


def _case(id: str, values: tuple[int, ...], b: tuple[int, ...], m: int, **more) -> OpCase:
    inputs = {"values": values, "rows": values[:4], "b": b}
    longer = {"b": (b[0], b[1] + 2)}
    kwargs = {"n": values[4], "m": m}
    return OpCase(grouped_nm_matmul, inputs, kwargs, id, draw={"rows": _permutations}, longer=longer, **more)


CASES = (
    _case(
        "2:4",
        (2, 3, 6, 2, 2),
        (12, 5),
        4,
        raises=(
            Raises(ValueError, "values must be (C, B, 4, g, 1) for 1:4: got (2, 3, 6, 2, 2)", {"n": 1}),
            Raises(
                ValueError,
                "b must have rows for 3 blocks of 4: got (8, 5)",
                inputs=((2, 3, 6, 2, 2), (2, 3, 6, 2), (8, 5)),
            ),
            Raises(
                ValueError,
                "rows must be int64 of shape (2, 3, 6, 2): got torch.int64 (2, 3, 6, 1)",
                inputs=((2, 3, 6, 2, 2), (2, 3, 6, 1), (12, 5)),
            ),
        ),
    ),
    _case("1:10", (1, 2, 10, 3, 1), (17, 4), 10),
    _case("1:1", (3, 5, 1, 2, 1), (5, 3), 1),
)
