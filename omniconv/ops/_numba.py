"""Kernels that numba compiles, run on all cores; for those with explicit vectors see `_simd`.

Kernels are plain loops, `numba.njit(nogil=True, cache=True)`, in a module of their own that is imported when one
runs first: numba is optional, and slow to import. They take numpy arrays, which share the tensors' memory.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HAS_NUMBA = find_spec("numba") is not None


def unsupported(*tensors: Tensor) -> str | None:
    """Return why compiled kernels cannot take tensors, or None: what every `supports` asks first."""
    if not HAS_NUMBA:
        return "numba is not installed (pip install 'omniconv[fast]')"
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it is for CPUs, not {tensor.device.type}"
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            return f"it is for float32 and float64, not {tensor.dtype}"
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="omniconv")


def spread(kernel: Callable[..., Any], count: int, *arguments: Any, least: int = 1) -> None:
    """Call `kernel(begin, end, *arguments)` for parts that together are `range(count)`, one on every thread of torch.

    Args:
        kernel: compiled with `nogil=True`; writes into the arrays among its arguments, parts without overlap.
        count: independent pieces of work.
        *arguments: passed on; tensors become numpy arrays on the same memory.
        least: pieces that are worth a thread.
    """
    arrays = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    threads = max(1, min(torch.get_num_threads(), count // max(1, least)))
    bounds = [count * part // threads for part in range(threads + 1)]
    if threads == 1:
        kernel(0, count, *arrays)
        return
    pool = _pool(threads)
    others = [pool.submit(kernel, bounds[part], bounds[part + 1], *arrays) for part in range(1, threads)]
    kernel(0, bounds[1], *arrays)
    for other in others:
        other.result()
