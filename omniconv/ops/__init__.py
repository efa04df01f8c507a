"""Functional operators: a reference that reads like the equation, fast implementations beside it."""

from omniconv.ops.conv.api import conv
from omniconv.ops.deform.api import deform_aggregate, deform_conv2d
from omniconv.ops.depthwise_conv.api import depthwise_conv
from omniconv.ops.dispatch import explain
from omniconv.ops.gather_host import gather_host
from omniconv.ops.inverse_conv.api import corner_conv, inverse_conv
from omniconv.ops.log_bessel.iv import log_iv
from omniconv.ops.log_bessel.kv import log_kv
from omniconv.ops.long_conv.api import long_conv
from omniconv.ops.sliding_window import sliding_window
from omniconv.ops.sparse_conv.api import sparse_conv
from omniconv.ops.tree_field.api import tree_field

__all__ = [
    "conv", "corner_conv", "deform_aggregate", "deform_conv2d", "depthwise_conv", "explain", "gather_host",
    "inverse_conv", "log_iv", "log_kv", "long_conv", "sliding_window", "sparse_conv", "tree_field",
]  # fmt: skip
