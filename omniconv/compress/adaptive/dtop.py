"""Dynamic token pruning: in a plain transformer that segments, tokens whose class is clear leave early.

Paper: Tang et al., Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation,
https://arxiv.org/abs/2308.01045. The heads are layer norms and linear layers, as in the paper's FCN hosts; its
attention-to-mask heads (SegViT) are not here.
"""

import copy
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from omniconv.compress.adaptive.steps import steps
from omniconv.layers.attention.self_attention import SelfAttention
from omniconv.models.dense.segmenter import Segmenter
from omniconv.models.image.vit import Block

__all__ = ["DynamicTokenPruning", "TokenHead", "decided_tokens", "masked_block"]


def decided_tokens(scores: Tensor, threshold: float, keep: int = 5, left: Tensor | None = None) -> Tensor:
    """Return which tokens (N, L) leave, given their scores (N, L, K).

    Those leave whose class has a probability above the threshold, but for the `keep` surest of every class, which stay
    as context for the others.

    Args:
        scores: of every class.
        threshold: of the probability; at 1 nobody leaves.
        keep: tokens of every class that stay.
        left: the tokens (N, L) that are there at all; all by default.
    """
    sure, classes = scores.softmax(2).max(2)
    clear = sure > threshold
    if left is not None:
        clear = clear & left
    order = sure.masked_fill(~clear, -1).argsort(dim=1, descending=True, stable=True)
    # How many clear tokens of its class come before each, the surest first.
    ranked = F.one_hot(classes.gather(1, order), scores.shape[2]) * clear.gather(1, order)[:, :, None]
    rank = (ranked.cumsum(1) * ranked).sum(2)
    return clear & (torch.empty_like(rank).scatter(1, order, rank) > keep)


def masked_block(block: Block, x: Tensor, seen: Tensor) -> Tensor:
    """Return what a block makes of tokens (N, L, D) when nobody attends to those that are not `seen`, (N, L)."""
    attention = cast(SelfAttention, block.attn)
    # Where nobody is left, nobody reads the answer; but it must not be NaN.
    seen = seen | ~seen.any(1, keepdim=True)
    q, k, v = attention.heads(block.norm1(x))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
    y = attention.proj(y.transpose(1, 2).flatten(2))
    x = x + block.drop_path(block.ls1(y))
    return x + block.drop_path(block.ls2(block.mlp(block.norm2(x))))


class TokenHead(nn.Sequential):
    """Layer norm and linear layer: scores (N, L, K) of tokens (N, L, D).

    Args:
        features: D.
        classes: K.
        device, dtype: of the parameters.
    """

    def __init__(self, features: int, classes: int, *, device=None, dtype=None) -> None:
        super().__init__(
            nn.LayerNorm(features, device=device, dtype=dtype),
            nn.Linear(features, classes, device=device, dtype=dtype),
        )


class DynamicTokenPruning(nn.Module):
    r"""A segmenter whose tokens leave as soon as they are clear (`DToP <https://arxiv.org/abs/2308.01045>`_).

    .. math:: \hat y_p = z_{p,e}, \qquad e = \min \{ i : \max_k \mathrm{softmax}(z_{p,i})_k > p_0 \}

    except the surest tokens of every class, which go on. Each image costs what it needs: in eval mode tokens that left
    are really gone. In training mode the answer is `forward_masked`, which computes the same for whole batches and
    has a gradient.

    Train the heads with the network first, all together: `exit_loss(network.forward_exits(x), masks)` of
    `omniconv.compress.adaptive.early_exit`; then, if wanted, fine-tune with `exit_loss(network(x), masks)`.

    Args:
        segmenter: the network; it becomes a part of this one and is not copied.
        exits: numbers of blocks behind which tokens can leave, such as (6, 8) of 12.
        threshold: :math:`p_0`, a probability; 1 lets nobody leave.
        keep: tokens of every class found at an exit that stay as context.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K, H, W)`; in training mode one for every exit and the end

    Raises:
        ValueError: if the exits do not rise within the depth, or if attention behind an exit depends on places.
    """

    def __init__(
        self, segmenter: Segmenter, exits: Sequence[int], *, threshold: float = 0.9, keep: int = 5
    ) -> None:
        super().__init__()
        encoder, head = segmenter.encoder, segmenter.head
        if (
            list(exits) != sorted(set(exits))
            or not exits
            or not 0 < exits[0] <= exits[-1] < len(encoder.blocks)
        ):
            raise ValueError(
                f"exits must rise between 1 and {len(encoder.blocks) - 1}, the blocks but one: got {tuple(exits)}"
            )
        behind = [cast(Block, block) for block in encoder.blocks.children()][exits[0] :]
        if encoder.join >= exits[0] or any(type(block.attn) is not SelfAttention for block in behind):
            raise ValueError("attention behind an exit must not depend on places: use later exits")
        self.segmenter = segmenter
        self.exits = tuple(exits)
        self.threshold, self.keep = threshold, keep
        self.heads = nn.ModuleList(
            TokenHead(head.in_features, head.out_features, device=head.weight.device, dtype=head.weight.dtype)
            for _ in exits
        )

    def _stages(self) -> list[nn.Sequential]:
        """Return the blocks between the exits."""
        cuts = [0, *self.exits, len(self.segmenter.encoder.blocks)]
        blocks = list(self.segmenter.encoder.blocks.children())
        return [nn.Sequential(*blocks[a:b]) for a, b in pairwise(cuts)]

    def _first(self, x: Tensor) -> Tensor:
        """Return all tokens (N, P + L, D) at the first exit."""
        for step in steps(self.segmenter.encoder):
            x = step.run(x)
            if step.name == f"blocks.{self.exits[0] - 1}":
                break
        return x

    def _scores(self, exit_: int, tokens: Tensor) -> Tensor:
        """Return the scores (N, L, K) of the patches' tokens at an exit; the last one is the segmenter's own."""
        patches = tokens[:, self.segmenter.encoder.prefix_tokens :]
        return self.heads[exit_](patches) if exit_ < len(self.heads) else self.segmenter.scores(patches)

    def forward_exits(self, x: Tensor) -> list[Tensor]:
        """Return what every exit, and last the segmenter's end, says of every pixel; nobody leaves."""
        tokens = self._first(x)
        maps = [self._scores(0, tokens)]
        for index, blocks in enumerate(self._stages()[1:], 1):
            tokens = blocks(tokens)
            maps.append(self._scores(index, tokens))
        return [self.segmenter.paint(scores, *x.shape[2:]) for scores in maps]

    def forward_masked(self, x: Tensor) -> list[Tensor]:
        """Return the scores of all pixels as they stand at every exit and at the end, tokens that left being masked."""
        tokens = self._first(x)
        canvas = self._scores(0, tokens)
        left = torch.ones(canvas.shape[:2], dtype=torch.bool, device=x.device)
        prefix = left.new_ones(len(x), self.segmenter.encoder.prefix_tokens)
        maps = [canvas]
        for index, blocks in enumerate(self._stages()[1:], 1):
            left = left & ~decided_tokens(maps[-1].detach(), self.threshold, self.keep, left)
            seen = torch.cat([prefix, left], 1)
            for block in blocks:
                tokens = masked_block(cast(Block, block), tokens, seen)
            maps.append(torch.where(left[:, :, None], self._scores(index, tokens), maps[-1]))
        return [self.segmenter.paint(scores, *x.shape[2:]) for scores in maps]

    def infer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores (N, K, H, W) and the exit (N, L) at which every token left; the end is the last one."""
        count = self.segmenter.encoder.prefix_tokens
        stages = self._stages()[1:]
        first = self._first(x)
        canvas = self._scores(0, first)
        taken = torch.zeros(canvas.shape[:2], dtype=torch.long, device=x.device)
        # How many tokens are left differs from image to image.
        for n, tokens in enumerate(first.split(1)):
            places = torch.arange(canvas.shape[1], device=x.device)
            for index, blocks in enumerate(stages, 1):
                stay = ~decided_tokens(canvas[n : n + 1, places], self.threshold, self.keep)[0]
                tokens = torch.cat([tokens[:, :count], tokens[:, count:][:, stay]], 1)
                places = places[stay]
                if not len(places):
                    break
                tokens = blocks(tokens)
                canvas[n, places] = self._scores(index, tokens)[0]
                taken[n, places] = index
        return self.segmenter.paint(canvas, *x.shape[2:]), taken

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return the scores of all pixels; in training mode as they stand at every exit."""
        return self.forward_masked(x) if self.training else self.infer(x)[0]

    @torch.no_grad()
    def image_macs(self, images: Tensor) -> list[int]:
        """Return the multiply-adds that each of the images takes."""
        _, taken = self.infer(images)
        with torch.device("meta"):
            shadow = copy.deepcopy(self).to("meta").eval()
        tokens = shadow._first(torch.empty_like(images[:1], device="meta"))
        prefix = tokens.shape[1] - taken.shape[1]

        @cache
        def stage(index: int, length: int) -> int:
            """Return what the blocks before an exit, and its head, cost for so many tokens."""
            with FlopCounterMode(display=False) as counter:
                if index == 0:
                    y = shadow._first(torch.empty_like(images[:1], device="meta"))
                else:
                    y = shadow._stages()[index](tokens.new_empty(1, prefix + length, tokens.shape[2]))
                shadow._scores(index, y)
            return counter.get_total_flops() // 2

        lengths = [(taken >= index).sum(1).tolist() for index in range(len(self.exits) + 1)]
        return [
            sum(stage(index, length) for index, length in enumerate(each) if length)
            for each in zip(*lengths, strict=True)
        ]
