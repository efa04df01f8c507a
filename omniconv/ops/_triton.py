"""Kernels that Triton compiles for CUDA; its interpreter runs the same ones on a CPU, which is how they are tested.

Kernels stand in a module of their own that is imported when one runs first: Triton is optional, slow to import, and
decides at the import whether it compiles or interprets. Until `omniconv.tune` has measured them on a device, `auto`
leaves them alone: a cost model needs measurements.
"""

import os
from importlib.metadata import version
from importlib.util import find_spec

from torch import Tensor

# Tuples of numbers, as the kernels take them, came with 3.3.
HAS_TRITON = find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) >= (3, 3)


def interpreted() -> bool:
    """Return whether Triton was told to interpret its kernels, which takes tensors of a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(*tensors: Tensor) -> str | None:
    """Return why Triton's kernels cannot take tensors, or None: what every `supports` asks first."""
    if not HAS_TRITON:
        return "Triton 3.3 is not installed (it comes with the CUDA builds of torch from 2.7 on)"
    for tensor in tensors:
        if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreted()):
            return f"it is for CUDA, not {tensor.device.type}"
    return None
