"""Functional operators: a reference that reads like the equation, fast implementations beside it."""

from omniconv.ops.depthwise_conv.api import depthwise_conv
from omniconv.ops.dispatch import explain

__all__ = ["depthwise_conv", "explain"]
