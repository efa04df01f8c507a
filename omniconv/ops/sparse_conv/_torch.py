"""Plain torch: takes every call; multiplies a row of zeros where no site is active."""

import torch
from torch import Tensor

from omniconv.ops.dispatch import needs_grad


def run(x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    """Gather all taps of a row side by side and multiply once."""
    rows = torch.cat([x, x.new_zeros(1, x.shape[1])])
    index = torch.where(neighbours < 0, x.shape[0], neighbours).flatten()
    columns = rows.index_select(0, index).reshape(neighbours.shape[0], neighbours.shape[1] * x.shape[1])
    return columns @ weight.flatten(2).permute(2, 1, 0).flatten(0, 1)


def supports(x: Tensor, weight: Tensor, neighbours: Tensor) -> str | None:
    """Return None: every call is supported."""
    return None


def estimate(x: Tensor, weight: Tensor, neighbours: Tensor) -> float:
    """Return about how many seconds the call takes on a CPU, with its gradients where they are wanted."""
    gathered = neighbours.numel() * weight.shape[1]
    seconds = 3e-5 + gathered * (2.5e-9 + weight.shape[0] * 1.5e-11)
    return 2.7 * seconds if needs_grad(x, weight) else seconds
