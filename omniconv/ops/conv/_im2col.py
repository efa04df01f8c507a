"""Every window copied into a column of a matrix, then one matrix product: the lowering that the others avoid."""

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.conv._torch import output_size, products
from omniconv.ops.memory_format import memory_format


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> Tensor:
    """Compute with `torch.nn.functional.unfold` and a matrix product."""
    columns = F.unfold(x, weight.shape[2:], dilation, padding, stride).unflatten(1, (groups, -1))
    y = weight.reshape(groups, weight.shape[0] // groups, -1) @ columns
    y = y.flatten(1, 2).unflatten(2, output_size(x, weight, stride, padding, dilation))
    y = y if bias is None else y + bias[:, None, None]
    return y.contiguous(memory_format=memory_format(x))


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> str | None:
    """Return None, or why the call cannot be computed here."""
    if x.dtype not in (torch.float32, torch.float64):
        return f"its sums would be rounded twice in {x.dtype}"
    return None if x.ndim == 4 else "it is for two axes, not one"


def estimate(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> float:
    """Return about how many seconds the call takes: most of them go into the matrix of columns."""
    taps = products(x, weight, stride, padding, dilation)
    return 3e-5 + 3e-9 * taps * groups / weight.shape[0] + taps / 5e10
