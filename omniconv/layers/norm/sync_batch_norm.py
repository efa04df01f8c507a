"""Batch norm over all processes, on CPUs too.

torch's own SyncBatchNorm takes CUDA tensors alone; this one is made of differentiable all-reduces.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omniconv.core.cases import Case

__all__ = ["SyncBatchNorm2d", "synchronise_batch_norm"]


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Sum over processes."""
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Every process's loss depends on every process's input, so gradients are summed as well."""
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


class SyncBatchNorm2d(nn.BatchNorm2d):
    r"""Batch normalisation whose statistics are those of the batch over all processes.

    .. math:: y = \gamma \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} + \beta

    from `Batch Normalization <https://arxiv.org/abs/1502.03167>`_. With one process it is `nn.BatchNorm2d`.
    Every process must hold equally many samples.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for `nn.BatchNorm2d`.

    Shapes:
        - input and output: :math:`(N, C, H, W)`
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with global statistics in training mode, with the running ones otherwise."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _AllReduceSum.apply(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = _AllReduceSum.apply((centred * centred).sum((0, 2, 3))) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * (count / (count - 1)), share)
        y = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(input.dtype)


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """Turn every `nn.BatchNorm2d` of `model` into a `SyncBatchNorm2d`, in place; state-dict names stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model


CASES = (
    Case(
        SyncBatchNorm2d,
        {"num_features": 6},
        inputs=((4, 6, 7, 5),),
        output=(4, 6, 7, 5),
        minimal=(2, 6, 1, 1),
    ),
)
