"""ScheduledDropPath: paths are dropped ever more often while training goes on.

Paper: Zoph et al., Learning Transferable Architectures for Scalable Image Recognition,
https://arxiv.org/abs/1707.07012, section 3; dropped with one probability from the start, the paths of its cells train
badly.
"""

import torch
from torch import Tensor

from omniconv.core.cases import Case, Raises
from omniconv.layers.drop_path import DropPath

__all__ = ["ScheduledDropPath"]


class ScheduledDropPath(DropPath):
    r"""Drop path of `NASNet <https://arxiv.org/abs/1707.07012>`_, whose probability rises linearly.

    .. math:: y_n = \frac{b_n}{1 - t p} x_n, \qquad b_n \sim \mathrm{Bernoulli}(1 - t p)

    in training mode, where t, the buffer `progress`, goes from 0 to 1 with the training; the identity in eval mode.
    It is 1 until `set_progress` is called, and is not part of the state dict.

    Args:
        p: probability at the end of the training, in [0, 1).

    Shapes:
        - input and output: :math:`(N, *)`

    Raises:
        ValueError: if `p` lies outside [0, 1).
    """

    progress: Tensor

    def __init__(self, p: float = 0.0) -> None:
        super().__init__(p)
        # A tensor, so that compiled programs follow it.
        self.register_buffer("progress", torch.ones(()), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Set the part of the training that is done, in [0, 1]."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1]: got {progress}")
        self.progress.fill_(progress)

    def forward(self, x: Tensor) -> Tensor:
        """Drop whole samples of `x` and rescale the others."""
        if not self.training or self.p == 0:
            return x
        p = self.p * self.progress.float()
        kept = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= p
        return x * (kept / (1 - p)).to(x.dtype)


CASES = (
    Case(
        ScheduledDropPath,
        {"p": 0.25},
        inputs=((3, 4, 5, 7),),
        output=(3, 4, 5, 7),
        minimal=(1, 1, 1, 1),
        raises=(Raises(ValueError, "p must lie in [0, 1): got 1", {"p": 1}),),
    ),
)
