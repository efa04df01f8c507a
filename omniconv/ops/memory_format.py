"""The memory format of a map, as torch's own convolutions see it."""

import torch
from torch import Tensor

__all__ = ["memory_format"]


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the format that the output of an operator on `x` should have: channels-last or the default one.

    Some channels of a map in channels-last count as channels-last too: they keep its order, if not its density. A
    branch of a network that answered in another format would have everything behind it converted.

    Args:
        x: a map (N, C, *S); only two and three axes S know channels-last.
    """
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if form is not None and (
        x.is_contiguous(memory_format=form) or (x.shape[1] > 1 and x.stride(1) == 1 and x.stride(-1) > 1)
    ):
        return form
    return torch.contiguous_format
