"""Deformable operators without a dense kernel: DCNv3 and DCNv4.

Papers: Wang et al., InternImage, https://arxiv.org/abs/2211.05778; Xiong et al., Efficient Deformable ConvNets,
https://arxiv.org/abs/2401.06197, which takes away the softmax over the taps. Parameter names and the order of their
rows are those of the public weights, whose taps go column by column with x before y.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.layers.norm.layer_norm2d import LayerNorm2d
from omniconv.ops.deform.api import deform_aggregate

__all__ = ["DCNv3", "DCNv4"]


class DCNv3(nn.Module):
    r"""Operator of `InternImage <https://arxiv.org/abs/2211.05778>`_: grouped, separable, softmax over the taps.

    .. math:: y = W_o \Big[\sum_k m_{gk}(p_0)\, (W_i x)_g(p_0 + s\,(p_k + \Delta p_{gk}(p_0)))\Big]_g, \qquad
        \sum_k m_{gk} = 1

    Offsets and masks are linear in :math:`\mathrm{GELU}(\mathrm{LN}(w * x))`, with a depthwise kernel w.

    Args:
        channels: C of input and output.
        groups: G, groups of channels with offsets and masks of their own.
        kernel_size: pixels along a side, odd.
        dw_kernel_size: of w, odd.
        offset_scale: s.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `groups` does not divide `channels` or a kernel size is even.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 4,
        kernel_size: int = 3,
        *,
        dw_kernel_size: int = 3,
        offset_scale: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _check(channels, groups, kernel_size, dw_kernel_size)
        self.groups, self.kernel_size, self.offset_scale = groups, kernel_size, offset_scale
        taps = groups * kernel_size**2
        # The identity stands where the public modules change the layout.
        self.dw_conv = nn.Sequential(
            nn.Conv2d(
                channels,
                channels,
                dw_kernel_size,
                padding=dw_kernel_size // 2,
                groups=channels,
                device=device,
                dtype=dtype,
            ),
            nn.Sequential(nn.Identity(), LayerNorm2d(channels, device=device, dtype=dtype)),
            nn.GELU(),
        )
        self.offset = nn.Linear(channels, 2 * taps, device=device, dtype=dtype)
        self.mask = nn.Linear(channels, taps, device=device, dtype=dtype)
        self.input_proj = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.output_proj = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; offsets start at zero and masks uniform."""
        for layer in self.dw_conv.modules():
            if isinstance(layer, nn.Conv2d | nn.LayerNorm):
                layer.reset_parameters()
        _zero(self.offset, self.mask)
        _xavier(self.input_proj, self.output_proj)

    def forward(self, x: Tensor) -> Tensor:
        """Aggregate `x`."""
        seen = self.dw_conv(x).permute(0, 2, 3, 1)
        offsets, masks = _rows_of_taps(self.groups, self.kernel_size, seen.device)
        mask = _rows(self.mask, masks, seen).unflatten(-1, (self.groups, -1)).softmax(-1).flatten(3)
        y = deform_aggregate(
            self.input_proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            _rows(self.offset, offsets, seen).permute(0, 3, 1, 2),
            mask.permute(0, 3, 1, 2),
            kernel_size=self.kernel_size, padding=self.kernel_size // 2, offset_scale=self.offset_scale,
        )  # fmt: skip
        return self.output_proj(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DCNv4(nn.Module):
    r"""Operator of `FlashInternImage <https://arxiv.org/abs/2401.06197>`_: DCNv3 with masks of any size and sign.

    .. math:: y = W_o \Big[\sum_k m_{gk}(p_0)\, (W_v x)_g(p_0 + s\,(p_k + \Delta p_{gk}(p_0)))\Big]_g

    One linear layer finds offsets and masks together. It starts at zero, and with it the output less its bias.

    Args:
        channels: C of input and output.
        groups: G, groups of channels with offsets and masks of their own.
        kernel_size: pixels along a side, odd.
        dw_kernel_size: of a depthwise convolution before the offsets and masks, odd; None for none.
        offset_scale: s.
        pointwise: project before and after the aggregation.
        output_bias: of the projection after it.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `groups` does not divide `channels` or a kernel size is even.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 4,
        kernel_size: int = 3,
        *,
        dw_kernel_size: int | None = None,
        offset_scale: float = 1.0,
        pointwise: bool = True,
        output_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _check(channels, groups, kernel_size, dw_kernel_size or 1)
        self.groups, self.kernel_size, self.offset_scale = groups, kernel_size, offset_scale
        self.offset_mask_dw: nn.Module = nn.Identity()
        if dw_kernel_size is not None:
            self.offset_mask_dw = nn.Conv2d(
                channels,
                channels,
                dw_kernel_size,
                padding=dw_kernel_size // 2,
                groups=channels,
                device=device,
                dtype=dtype,
            )
        # Padded to a multiple of eight as in the public weights.
        self.offset_mask = nn.Linear(
            channels, math.ceil(3 * groups * kernel_size**2 / 8) * 8, device=device, dtype=dtype
        )
        self.value_proj = (
            nn.Linear(channels, channels, device=device, dtype=dtype) if pointwise else nn.Identity()
        )
        self.output_proj = (
            nn.Linear(channels, channels, bias=output_bias, device=device, dtype=dtype)
            if pointwise
            else nn.Identity()
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; offsets and masks start at zero."""
        if isinstance(self.offset_mask_dw, nn.Conv2d):
            self.offset_mask_dw.reset_parameters()
        _zero(self.offset_mask)
        _xavier(self.value_proj, self.output_proj)

    def forward(self, x: Tensor) -> Tensor:
        """Aggregate `x`."""
        taps = self.kernel_size**2
        seen = self.offset_mask_dw(x).permute(0, 2, 3, 1)
        # A group's numbers stand together: its offsets, then its masks.
        of_group = 3 * taps * torch.arange(self.groups, device=seen.device)[:, None]
        offsets, masks = (
            (of_group + rows).flatten() for rows in _rows_of_taps(1, self.kernel_size, seen.device, 2 * taps)
        )
        y = deform_aggregate(
            self.value_proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            _rows(self.offset_mask, offsets, seen).permute(0, 3, 1, 2),
            _rows(self.offset_mask, masks, seen).permute(0, 3, 1, 2),
            kernel_size=self.kernel_size, padding=self.kernel_size // 2, offset_scale=self.offset_scale,
        )  # fmt: skip
        return self.output_proj(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _check(channels: int, groups: int, *kernels: int) -> None:
    if channels % groups:
        raise ValueError(f"groups must divide channels: got {groups} and {channels}")
    if any(kernel % 2 == 0 for kernel in kernels):
        raise ValueError(f"kernel sizes must be odd: got {' and '.join(map(str, kernels))}")


def _zero(*layers: nn.Linear) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def _xavier(*layers: nn.Module) -> None:
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _rows_of_taps(groups: int, kernel: int, device: torch.device, after: int = 0) -> tuple[Tensor, Tensor]:
    """Return which rows of public weights give the operator's offsets, row by row and y first, and its masks.

    Masks are counted from `after`.
    """
    index = (
        torch.arange(groups * kernel**2, device=device).view(groups, kernel, kernel).transpose(1, 2).flatten()
    )
    return torch.stack([2 * index + 1, 2 * index], -1).flatten(), index + after


def _rows(layer: nn.Linear, rows: Tensor, x: Tensor) -> Tensor:
    """Return some of a linear layer's outputs, in the order of `rows`."""
    return F.linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows])


_ODD = Raises(ValueError, "kernel sizes must be odd: got 4 and 3", {"kernel_size": 4, "dw_kernel_size": 3})
_DIVIDE = Raises(ValueError, "groups must divide channels: got 4 and 6", {"groups": 4})

CASES = (
    Case(
        DCNv3, {"channels": 6, "groups": 2}, ((2, 6, 7, 5),), (2, 6, 7, 5), minimal=(1, 6, 1, 1),
        raises=(_ODD, _DIVIDE),
    ),
    Case(
        DCNv4, {"channels": 6, "groups": 3, "dw_kernel_size": 3, "offset_scale": 0.5, "output_bias": False},
        ((2, 6, 7, 5),), (2, 6, 7, 5), minimal=(1, 6, 1, 1), raises=(_ODD, _DIVIDE),
    ),
    Case(
        DCNv4, {"channels": 4, "groups": 1, "pointwise": False}, ((2, 4, 6, 5),), (2, 4, 6, 5), id="aggregation",
    ),
)  # fmt: skip
