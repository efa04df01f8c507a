"""Sparsity as a programming model: layouts, operators and sparsifiers, each registered apart."""

from omniconv.ops.sparse import implementations
from omniconv.ops.sparse.base import Layout, call, register_operator
from omniconv.ops.sparse.builder import sparsify_model
from omniconv.ops.sparse.formats import Format, sparsified
from omniconv.ops.sparse.sparsifiers import register_sparsifier, sparsify

__all__ = [
    "Format",
    "Layout",
    "call",
    "implementations",
    "register_operator",
    "register_sparsifier",
    "sparsified",
    "sparsify",
    "sparsify_model",
]
