"""Polyphase anchoring: strided steps that see the same patches wherever the image is shifted to.

Paper: Ding et al., Reviving Shift Equivariance in Vision Transformers, https://arxiv.org/abs/2306.07470. A grid of
stride s has s x s places to stand on. The image itself says which: the one whose pixels have the largest norm. Then a
circular shift of the image shifts the patches, windows or keys as wholes, and their contents stay. `VisionTransformer`
and `Twins` do so with `anchored=True`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.layers.conv.patch import PatchConv2d

__all__ = ["AnchoredConv2d", "PolyphaseAnchor", "polyphase_anchor", "roll_each"]


def roll_each(x: Tensor, shift: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    r"""Return maps of which each is rolled by a shift of its own.

    .. math:: y_{nchw} = x_{n, c, (h + s_{n1}) \bmod H, (w + s_{n2}) \bmod W}

    Args:
        x: maps.
        shift: rows and columns by which each one moves up and left, integers.
        size: H and W, if they are not those of x, of which then the rest is left out.

    Shapes:
        - x and output: :math:`(N, C, H, W)`
        - shift: :math:`(N, 2)`
    """
    height, width = size or x.shape[2:]
    samples, rows, columns = (torch.arange(n, device=x.device) for n in (x.shape[0], height, width))
    rows = (rows + shift[:, :1]) % height
    columns = (columns + shift[:, 1:]) % width
    rolled = x.permute(0, 2, 3, 1)[samples[:, None, None], rows[:, :, None], columns[:, None]]
    return rolled.permute(0, 3, 1, 2)


def polyphase_anchor(x: Tensor, stride: int, p: float = 2.0) -> tuple[Tensor, Tensor]:
    r"""Roll every map so that its polyphase component of the largest norm comes to lie on the grid of a stride.

    .. math:: s_n = \operatorname*{argmax}_{0 \le i, j < s} \sum_{c,h,w} |x_{n, c, sh + i, sw + j}|^p

    Of equal components the first counts; if they differ nevertheless, that choice alone is not equivariant. Maps that
    the stride does not divide are completed with zeros at their ends; equivariance is then approximate.

    Args:
        x: maps.
        stride: s, pixels.
        p: of the norm.

    Returns:
        The rolled maps, and the shifts (N, 2), of which `roll_each(rolled, -shifts)` is the inverse.

    Shapes:
        - x: :math:`(N, C, H, W)`
        - rolled: :math:`(N, C, s \lceil H / s \rceil, s \lceil W / s \rceil)`
    """
    down, across = ((n + stride - 1) // stride for n in x.shape[2:])
    # The same padding for all sizes, which compilers like; windows and the roll leave the surplus out.
    x = F.pad(x, (0, stride - 1, 0, stride - 1))
    energy = x.detach().abs().pow(p).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    best = energy.unfold(1, stride, stride).unfold(2, stride, stride).sum((1, 2)).flatten(1).argmax(1)
    shift = torch.stack([best // stride, best % stride], 1)
    return roll_each(x, shift, (down * stride, across * stride)), shift


class PolyphaseAnchor(nn.Module):
    r"""Rolls maps as `polyphase anchoring <https://arxiv.org/abs/2306.07470>`_ does; see `polyphase_anchor`.

    .. math:: y_{nchw} = x_{n, c, (h + s_{n1}) \bmod H, (w + s_{n2}) \bmod W}

    A strided layer behind it is equivariant: a circular shift of x shifts its output by whole pixels, or not at all.

    Args:
        stride: of the step that follows, pixels.
        p: of the norm.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, C, s \lceil H / s \rceil, s \lceil W / s \rceil)`

    Raises:
        ValueError: if `stride` is not positive.
    """

    def __init__(self, stride: int, p: float = 2.0) -> None:
        super().__init__()
        if stride < 1:
            raise ValueError(f"stride must be positive: got {stride}")
        self.stride, self.p = stride, p

    def forward(self, x: Tensor) -> Tensor:
        """Roll the maps of `x`."""
        return polyphase_anchor(x, self.stride, self.p)[0]

    def extra_repr(self) -> str:
        """Show stride and norm."""
        return f"stride={self.stride}, p={self.p}"


class AnchoredConv2d(PatchConv2d):
    r"""Convolution of patches that follow the image, with the weights of an ordinary one.

    .. math:: y = W *_P \mathrm{anchor}_P(x)

    A circular shift of x shifts y by whole pixels. Patches that the map fills in part are completed with zeros.

    Args:
        in_channels, out_channels: as in `torch.nn.Conv2d`.
        patch_size: P, pixels along a side of a patch.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, \lceil H / P \rceil, \lceil W / P \rceil)`
    """

    def forward(self, input: Tensor) -> Tensor:
        """Anchor `input` and convolve it."""
        return F.conv2d(polyphase_anchor(input, self.patch_size)[0], self.weight, self.bias, self.stride)


CASES = (
    Case(
        PolyphaseAnchor,
        {"stride": 3},
        inputs=((2, 3, 7, 5),),
        output=(2, 3, 9, 6),
        minimal=(1, 3, 1, 1),
        raises=(Raises(ValueError, "stride must be positive: got 0", {"stride": 0}),),
    ),
    Case(
        AnchoredConv2d,
        {"in_channels": 3, "out_channels": 4, "patch_size": 2},
        inputs=((2, 3, 7, 4),),
        output=(2, 4, 4, 2),
        minimal=(1, 3, 1, 1),
    ),
)
