"""Convolution of patches: the step that makes tokens of an image, for images of any size.

Paper: Dosovitskiy et al., An Image is Worth 16x16 Words, https://arxiv.org/abs/2010.11929.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises

__all__ = ["PatchConv2d"]


class PatchConv2d(nn.Conv2d):
    r"""Convolution whose stride is its kernel's size, of `ViT <https://arxiv.org/abs/2010.11929>`_.

    .. math:: y_{oij} = b_o + \sum_{c,u,v} w_{ocuv}\, x_{c, iP + u, jP + v}

    Patches that the image fills in part are completed with zeros.

    Args:
        in_channels, out_channels: as in `torch.nn.Conv2d`.
        patch_size: P, pixels along a side of a patch.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C_\mathrm{in}, H, W)`
        - output: :math:`(N, C_\mathrm{out}, \lceil H / P \rceil, \lceil W / P \rceil)`

    Raises:
        ValueError: if `patch_size` is not positive.
    """

    def __init__(
        self, in_channels: int, out_channels: int, patch_size: int, *, device=None, dtype=None
    ) -> None:
        if patch_size < 1:
            raise ValueError(f"patch_size must be positive: got {patch_size}")
        super().__init__(in_channels, out_channels, patch_size, patch_size, device=device, dtype=dtype)
        self.patch_size = patch_size

    def forward(self, input: Tensor) -> Tensor:
        """Return the tokens of `input` as a map."""
        height, width = input.shape[2:]
        if torch.compiler.is_compiling() or height % self.patch_size or width % self.patch_size:
            # The same padding for all sizes, which compilers like; the stride passes over what no patch needs.
            input = F.pad(input, (0, self.patch_size - 1, 0, self.patch_size - 1))
        return super().forward(input)


CASES = (
    Case(
        PatchConv2d,
        {"in_channels": 3, "out_channels": 5, "patch_size": 4},
        inputs=((2, 3, 7, 13),),
        output=(2, 5, 2, 4),
        minimal=(1, 3, 1, 1),
        raises=(Raises(ValueError, "patch_size must be positive: got 0", {"patch_size": 0}),),
    ),
)
