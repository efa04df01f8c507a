"""One layer of a vision transformer performs any convolution: the proof as code.

Paper: Li et al., Can Vision Transformers Perform Convolution?, https://arxiv.org/abs/2111.01353. Each head looks at one
neighbouring patch, for its bias prefers that offset beyond all content; its values and projection hold the block of
the convolution that leads from that patch's pixels to the pixels of the patch in the middle. Tokens of zeros around
the map stand for the convolution's padding.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.layers.attention.patch_attention import PatchAttention

__all__ = [
    "TokenConv2d", "attention_from_conv", "bias_for_leak", "conv_blocks", "convs_to_attention", "heads_needed",
]  # fmt: skip


def _reach(kernel_size: int, patch_size: int) -> int:
    return math.ceil((kernel_size - 1) / (2 * patch_size))


def heads_needed(kernel_size: int, patch_size: int) -> int:
    r"""Return :math:`(2 \lceil (K - 1) / 2P \rceil + 1)^2`, the patches that a patch's pixels see."""
    return (2 * _reach(kernel_size, patch_size) + 1) ** 2


def bias_for_leak(tokens: int, leak: float) -> float:
    r"""Return the smallest bias with which a softmax leaves at most `leak` to the other tokens.

    .. math:: \beta = \log\frac{(L - 1)(1 - \epsilon)}{\epsilon}

    Args:
        tokens: L, all that a head may look at.
        leak: :math:`\epsilon`, between 0 and 1.
    """
    return math.log((tokens - 1) * (1 - leak) / leak)


def conv_blocks(weight: Tensor, patch_size: int) -> Tensor:
    r"""Return the unrolled convolution, a matrix for each patch that a patch's pixels see.

    .. math:: M_{ij}[(c, y', x'), (o, y, x)] = w[o, c, iP + y' - y + \lfloor K/2 \rfloor,
        jP + x' - x + \lfloor K/2 \rfloor]

    and zero where an index lies outside the kernel. Their rank as vectors is the least number of heads whose attention
    depends on positions alone.

    Args:
        weight: (O, C, K, K), with K odd.
        patch_size: P, pixels along a side of a patch.

    Shapes:
        - output: (heads, C P P, O P P), offsets (i, j) row by row, pixels as `F.pixel_unshuffle` orders them
    """
    size = weight.shape[-1]
    reach = _reach(size, patch_size)
    pixel = torch.arange(patch_size, device=weight.device)
    shift = torch.arange(-reach, reach + 1, device=weight.device) * patch_size
    tap = shift[:, None, None] + pixel[:, None] - pixel + size // 2
    inside = ((tap >= 0) & (tap < size)).to(weight)
    tap = tap.clamp(0, size - 1)
    picked = weight[:, :, tap[:, None, :, :, None, None], tap[None, :, None, None]]
    picked = picked * inside[:, None, :, :, None, None] * inside[None, :, None, None]
    # (o, c, i, j, y', y, x', x) -> (i, j, c, y', x', o, y, x)
    return picked.permute(2, 3, 1, 4, 6, 0, 5, 7).flatten(5).flatten(2, 4).flatten(0, 1)


class TokenConv2d(nn.Module):
    """A convolution of the pixels that tokens (N, H, W, C P P) hold, which stay tokens.

    Args:
        conv: of stride 1, with an odd square kernel and zeros around the map that keep its size.
        patch_size: P, pixels along a side of a patch.

    Raises:
        ValueError: if the convolution changes the size of a map, or has groups or dilation.
    """

    def __init__(self, conv: nn.Conv2d, patch_size: int) -> None:
        super().__init__()
        size = conv.kernel_size[0]
        wanted = ((size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros")
        got = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        if size % 2 == 0 or got != wanted:
            raise ValueError(
                f"the convolution must be dense, with an odd square kernel that keeps the size of maps: got {conv}"
            )
        self.conv, self.patch_size = conv, patch_size

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the pixels of the tokens."""
        pixels = F.pixel_shuffle(x.permute(0, 3, 1, 2), self.patch_size)
        return F.pixel_unshuffle(self.conv(pixels), self.patch_size).permute(0, 2, 3, 1)


@torch.no_grad()
def attention_from_conv(
    layer: TokenConv2d, size: tuple[int, int], *, key_dim: int = 8, leak: float = 1e-6
) -> PatchAttention:
    r"""Return an attention layer that computes what a convolution does.

    Queries are zero, so that content plays no part, and keys are not, so that it can learn to.

    Args:
        layer: the convolution of patches.
        size: (H, W), the most tokens that a map will have.
        key_dim: features of a head's queries and keys.
        leak: attention that each head may leave to others than its patch.
    """
    conv, patch = layer.conv, layer.patch_size
    kernel = conv.kernel_size[0]
    blocks = conv_blocks(conv.weight, patch)
    heads, features, outputs = blocks.shape
    reach = _reach(kernel, patch)
    attention = PatchAttention(
        features, outputs, heads, head_dim=features, key_dim=key_dim, reach=reach,
        device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    nn.init.zeros_(attention.query.weight)
    attention.value.weight.copy_(torch.eye(features).repeat(heads, 1))
    attention.proj.weight.copy_(blocks.flatten(0, 1).T)
    nn.init.zeros_(attention.proj.bias)
    if conv.bias is not None:
        attention.proj.bias.copy_(conv.bias.repeat_interleave(patch**2))
    side = 2 * reach + 1
    tokens = (size[0] + 2 * reach) * (size[1] + 2 * reach)
    for head in range(heads):
        row, column = divmod(head, side)
        attention.position[head, row + 1, column + 1] = bias_for_leak(tokens, leak)
    return attention


def convs_to_attention(
    model: nn.Module, size: tuple[int, int], *, key_dim: int = 8, leak: float = 1e-6
) -> nn.Module:
    """Return a copy of a model in which attention does what convolutions of patches did.

    The paper's two-phase training: train the convolutional form first, convert it, and go on.

    Args:
        model: holds `TokenConv2d`; it is left as it is.
        size: (H, W), the most tokens that a map will have.
        key_dim: features of a head's queries and keys.
        leak: attention that each head may leave to others than its patch; a softmax that leaks nothing learns nothing.
    """
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, TokenConv2d):
            model.set_submodule(name, attention_from_conv(layer, size, key_dim=key_dim, leak=leak))
    return model
