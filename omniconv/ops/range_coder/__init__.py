"""A range coder: integers to bytes at the cost of their probabilities, and back."""

from omniconv.ops.range_coder.api import PRECISION, CodingTables, decode, encode, make_tables

__all__ = ["PRECISION", "CodingTables", "decode", "encode", "make_tables"]
