"""EvoNorm: normalisation and activation in one formula, found by evolution.

Paper: Liu et al., Evolving Normalization-Activation Layers, https://arxiv.org/abs/2004.02967. The B series looks at
the whole batch and keeps a moving average for inference; the S series sees one sample alone. The search that finds
such formulas is in `omniconv.design.nas.evonorm_search`.
"""

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises

__all__ = ["EvoNormB0", "EvoNormB1", "EvoNormB2", "EvoNormS0", "EvoNormS1", "EvoNormS2"]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return variance and mean (N, C) of every channel of every sample, at least in single precision."""
    return torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), (2, 3), correction=0)


class _EvoNorm(nn.Module):
    """The affine end that all members share, and v for those that have it; without `act` the end is everything."""

    has_v = False

    def __init__(self, channels: int, act: bool, eps: float, device=None, dtype=None) -> None:
        super().__init__()
        self.act, self.eps = act, eps
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        if act and self.has_v:
            self.v = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Start with scales and v of one and shifts of zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if self.act and self.has_v:
            nn.init.ones_(self.v)

    def normalise(self, x: Tensor) -> Tensor:
        """Return `x` before the affine end."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate `x`."""
        weight, bias = self.weight[:, None, None].to(x.dtype), self.bias[:, None, None].to(x.dtype)
        return (self.normalise(x) if self.act else x) * weight + bias


class EvoNormB0(_EvoNorm):
    r"""Batch-dependent layer B0 of `Evolving Normalization-Activation Layers <https://arxiv.org/abs/2004.02967>`_.

    .. math:: y = \frac{x}{\max\bigl(\sqrt{s^2_{b,w,h}(x)},\; v\,x + \sqrt{s^2_{w,h}(x)}\bigr)}\, \gamma + \beta

    where :math:`s^2` is the variance over the axes in its index; in eval mode the first one is a moving average.

    Args:
        channels: C, of the input.
        act: leave the formula out and keep :math:`x \gamma + \beta` alone where `False`, as the paper does where no
            activation follows, for example before a residual addition.
        momentum: weight of a new batch in the moving average.
        eps: is added to variances.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`
    """

    has_v = True
    running_var: Tensor

    def __init__(
        self,
        channels: int,
        *,
        act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(channels, act, eps, device, dtype)
        self.momentum = momentum
        self.register_buffer("running_var", torch.ones(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with scales and v of one, shifts of zero and a moving average of one."""
        super().reset_parameters()
        self.running_var.fill_(1)

    def rival(self, x: Tensor, var: Tensor, mean: Tensor) -> Tensor:
        """Return what the deviation over the batch competes with; `var` and `mean` are (N, C, 1, 1)."""
        return self.v[:, None, None] * x + (var + self.eps).sqrt()

    def normalise(self, x: Tensor) -> Tensor:
        """Divide by the larger of the batch's deviation and its rival."""
        var, mean = _moments(x)
        if self.training:
            batch = var.mean(0) + mean.var(0, correction=0)  # over (N, H, W), from the variances over (H, W)
            self.running_var.lerp_(batch.detach().to(self.running_var.dtype), self.momentum)
        else:
            batch = self.running_var.to(var.dtype)
        deviation = (batch + self.eps).sqrt()[:, None, None]
        var, mean = var[:, :, None, None], mean[:, :, None, None]
        return (x / torch.maximum(deviation, self.rival(x, var, mean))).to(x.dtype)


class EvoNormB1(EvoNormB0):
    r"""Batch-dependent layer B1 of `Evolving Normalization-Activation Layers <https://arxiv.org/abs/2004.02967>`_.

    .. math:: y = \frac{x}{\max\bigl(\sqrt{s^2_{b,w,h}(x)},\; (x + 1) \sqrt{\overline{x^2}_{w,h}}\bigr)}\, \gamma
              + \beta

    Args:
        channels, act, momentum, eps, device, dtype: as of `EvoNormB0`.

    Shapes:
        - input and output: :math:`(N, C, H, W)`
    """

    has_v = False

    def rival(self, x: Tensor, var: Tensor, mean: Tensor) -> Tensor:
        """Return what the deviation over the batch competes with."""
        return (x + 1) * (var + mean.square() + self.eps).sqrt()


class EvoNormB2(EvoNormB0):
    r"""Batch-dependent layer B2 of `Evolving Normalization-Activation Layers <https://arxiv.org/abs/2004.02967>`_.

    .. math:: y = \frac{x}{\max\bigl(\sqrt{s^2_{b,w,h}(x)},\; \sqrt{\overline{x^2}_{w,h}} - x\bigr)}\, \gamma + \beta

    Args:
        channels, act, momentum, eps, device, dtype: as of `EvoNormB0`.

    Shapes:
        - input and output: :math:`(N, C, H, W)`
    """

    has_v = False

    def rival(self, x: Tensor, var: Tensor, mean: Tensor) -> Tensor:
        """Return what the deviation over the batch competes with."""
        return (var + mean.square() + self.eps).sqrt() - x


class EvoNormS0(_EvoNorm):
    r"""Batch-independent layer S0 of `Evolving Normalization-Activation Layers <https://arxiv.org/abs/2004.02967>`_.

    .. math:: y = \frac{x\, \sigma(v\,x)}{\sqrt{s^2_{w,h,c/g}(x)}}\, \gamma + \beta

    where :math:`s^2_{w,h,c/g}` is the variance over the pixels and the channels of one group, of one sample.

    Args:
        channels: C, of the input.
        groups: g.
        act: leave the formula out and keep :math:`x \gamma + \beta` alone where `False`, as the paper does where no
            activation follows, for example before a residual addition.
        eps: is added to the variance.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if `groups` does not divide `channels`.
    """

    has_v = True

    def __init__(
        self, channels: int, groups: int = 32, *, act: bool = True, eps: float = 1e-5, device=None, dtype=None
    ) -> None:
        if channels % groups:
            raise ValueError(f"channels must be divisible by groups: got {channels} and {groups}")
        super().__init__(channels, act, eps, device, dtype)
        self.groups = groups
        self.reset_parameters()

    def gate(self, x: Tensor) -> Tensor:
        """Return the factor of `x` in the numerator."""
        return (self.v[:, None, None].to(x.dtype) * x).sigmoid()

    def spread(self, var: Tensor, mean: Tensor) -> Tensor:
        """Return the squared denominator (N, g) from variances and means (N, g, C / g) of the channels."""
        return var.mean(2) + mean.var(2, correction=0)

    def normalise(self, x: Tensor) -> Tensor:
        """Divide the activated `x` by the deviation of each group."""
        var, mean = (moment.unflatten(1, (self.groups, -1)) for moment in _moments(x))
        deviation = (self.spread(var, mean) + self.eps).sqrt()
        deviation = deviation.repeat_interleave(x.shape[1] // self.groups, 1)[:, :, None, None]
        return (x * self.gate(x) / deviation).to(x.dtype)


class EvoNormS1(EvoNormS0):
    r"""Batch-independent layer S1 of `Evolving Normalization-Activation Layers <https://arxiv.org/abs/2004.02967>`_.

    .. math:: y = \frac{x\, \sigma(x)}{\sqrt{s^2_{w,h,c/g}(x)}}\, \gamma + \beta

    Args:
        channels, groups, act, eps, device, dtype: as of `EvoNormS0`.

    Shapes:
        - input and output: :math:`(N, C, H, W)`
    """

    has_v = False

    def gate(self, x: Tensor) -> Tensor:
        """Return the factor of `x` in the numerator."""
        return x.sigmoid()


class EvoNormS2(EvoNormS1):
    r"""Batch-independent layer S2 of `Evolving Normalization-Activation Layers <https://arxiv.org/abs/2004.02967>`_.

    .. math:: y = \frac{x\, \sigma(x)}{\sqrt{\overline{x^2}_{w,h,c/g}}}\, \gamma + \beta

    Args:
        channels, groups, act, eps, device, dtype: as of `EvoNormS0`.

    Shapes:
        - input and output: :math:`(N, C, H, W)`
    """

    def spread(self, var: Tensor, mean: Tensor) -> Tensor:
        """Return the mean square of each group."""
        return (var + mean.square()).mean(2)


_SHAPE = (3, 12, 7, 5)
_UNEVEN = Raises(
    ValueError, "channels must be divisible by groups: got 12 and 5", {"channels": 12, "groups": 5}
)

CASES = (
    *(
        Case(layer, {"channels": 12}, inputs=(_SHAPE,), output=_SHAPE, minimal=(1, 12, 1, 1))
        for layer in (EvoNormB0, EvoNormB1, EvoNormB2)
    ),
    *(
        Case(
            layer,
            {"channels": 12, "groups": 4},
            inputs=(_SHAPE,),
            output=_SHAPE,
            minimal=(1, 12, 1, 1),
            raises=(_UNEVEN,),
        )
        for layer in (EvoNormS0, EvoNormS1, EvoNormS2)
    ),
)
