"""Dilated re-parameterization: a large depthwise kernel trained beside dilated small ones, deployed alone.

Paper: Ding et al., UniRepLKNet, https://arxiv.org/abs/2311.15599. A dilated convolution is the dense one whose
kernel has zeros between its weights, so all branches sum to one K x K kernel.
"""

from typing import Any

from torch import Tensor, nn

from omniconv.core.cases import Case, Raises
from omniconv.layers.conv.reparam import fuse_conv_bn

__all__ = ["DILATED_BRANCHES", "DilatedReparamBlock", "insert_zeros"]

DILATED_BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Large kernel size K -> the authors' (kernel size k, dilation r) of every branch; (k - 1) r + 1 <= K."""


def insert_zeros(kernel: Tensor, dilation: int) -> Tensor:
    """Return the dense kernel (C, 1, (k - 1) r + 1, ...) equal to `kernel` (C, 1, k, k) with dilation r."""
    size = [(k - 1) * dilation + 1 for k in kernel.shape[2:]]
    dense = kernel.new_zeros(*kernel.shape[:2], *size)
    dense[:, :, ::dilation, ::dilation] = kernel
    return dense


class DilatedReparamBlock(nn.Module):
    r"""Depthwise convolution of `UniRepLKNet <https://arxiv.org/abs/2311.15599>`_, trained in parallel branches.

    .. math:: y = \mathrm{BN}_0(W * x) + \sum_i \mathrm{BN}_i(w_i *_{r_i} x)

    with a K x K kernel W and small kernels :math:`w_i` of dilation :math:`r_i`. In eval mode it equals the one
    convolution that `merged` returns. The state-dict names are those of the public weights.

    Args:
        channels: channels C.
        kernel_size: K, one of the odd sizes 5 to 17.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if there are no branches for `kernel_size`.
    """

    def __init__(self, channels: int, kernel_size: int, *, device=None, dtype=None) -> None:
        super().__init__()
        if kernel_size not in DILATED_BRANCHES:
            raise ValueError(
                f"kernel_size must be one of {', '.join(map(str, DILATED_BRANCHES))}: got {kernel_size}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def depthwise(size: int, dilation: int) -> nn.Conv2d:
            padding = (size - 1) * dilation // 2
            return nn.Conv2d(channels, channels, size, 1, padding, dilation, channels, bias=False, **factory)

        self.lk_origin = depthwise(kernel_size, 1)
        self.origin_bn = nn.BatchNorm2d(channels, **factory)
        self.branches = DILATED_BRANCHES[kernel_size]
        for size, dilation in self.branches:
            self.add_module(f"dil_conv_k{size}_{dilation}", depthwise(size, dilation))
            self.add_module(f"dil_bn_k{size}_{dilation}", nn.BatchNorm2d(channels, **factory))

    def reset_parameters(self) -> None:
        """Draw new weights and forget the running statistics."""
        for module in self.children():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of all branches."""
        y = self.origin_bn(self.lk_origin(x))
        for size, dilation in self.branches:
            conv = self.get_submodule(f"dil_conv_k{size}_{dilation}")
            norm = self.get_submodule(f"dil_bn_k{size}_{dilation}")
            y = y + norm(conv(x))
        return y

    def merged(self) -> nn.Conv2d:
        """Return the depthwise K x K convolution with bias that equals this block in eval mode."""
        weight, bias = fuse_conv_bn(self.lk_origin.weight, None, self.origin_bn)
        for size, dilation in self.branches:
            conv = self.get_submodule(f"dil_conv_k{size}_{dilation}")
            norm = self.get_submodule(f"dil_bn_k{size}_{dilation}")
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            branch, shift = fuse_conv_bn(conv.weight, None, norm)
            dense = insert_zeros(branch, dilation)
            margin = (weight.shape[-1] - dense.shape[-1]) // 2
            weight = weight + nn.functional.pad(dense, (margin,) * 4)
            bias = bias + shift
        conv = nn.Conv2d(
            len(weight), len(weight), weight.shape[-1], padding=weight.shape[-1] // 2, groups=len(weight),
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        conv.weight = nn.Parameter(weight.detach())
        conv.bias = nn.Parameter(bias.detach())
        return conv


CASES = (
    Case(
        DilatedReparamBlock,
        {"channels": 4, "kernel_size": 13},
        inputs=((2, 4, 15, 11),),
        output=(2, 4, 15, 11),
        id="13",
        minimal=(2, 4, 1, 1),
        raises=(
            Raises(
                ValueError,
                "kernel_size must be one of 5, 7, 9, 11, 13, 15, 17: got 3",
                {"channels": 4, "kernel_size": 3},
            ),
        ),
    ),
    Case(
        DilatedReparamBlock,
        {"channels": 3, "kernel_size": 7},
        inputs=((2, 3, 9, 5),),
        output=(2, 3, 9, 5),
        id="7",
        minimal=(2, 3, 1, 1),
    ),
)
