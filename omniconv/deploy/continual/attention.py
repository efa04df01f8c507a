"""Continual attention: self-attention over the last n tokens, for n products a new token instead of n squared.

Paper: Hedegaard, Efficient Online Processing with Deep Neural Networks, https://arxiv.org/abs/2306.13474, and there
Continual Transformers, https://arxiv.org/abs/2201.06268. What differs: every row of the retroactive attention keeps
its largest score, so that no exponential overflows, and a row whose weights have nearly all left the window is
computed anew, since what is left of a difference is then rounding error.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from omniconv.deploy.continual.stream import Span, Stream

__all__ = [
    "ContinualTransformerEncoder", "ContinualTransformerEncoderLayer", "RecyclingPositions",
    "RetroactiveAttention", "SingleOutputAttention",
]  # fmt: skip

# A row of the retroactive attention holds a sum of weights; they were all at most 1, and one of them was 1.
_CANCELLED = 0.1


class _ContinualAttention(Stream, nn.MultiheadAttention):
    """Self-attention with the parameters and arguments of `torch.nn.MultiheadAttention`, and a window of `frames`."""

    axis = 1
    whole = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        frames: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads: got {embed_dim} and {num_heads}")
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first=True, device=device, dtype=dtype)
        self.frames = frames

    @property
    def span(self) -> Span:
        """The window."""
        return Span(self.frames)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # queries, keys and values are one
        """Return the attention of all tokens (N, T, E) over all."""
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(2, 3)).softmax(-1)
        return self.merge(nn.functional.dropout(weights, self.dropout, self.training) @ v)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return scaled queries, keys and values (N, heads, T, E / heads) of tokens."""
        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q / math.sqrt(self.head_dim), k, v

    def merge(self, heads: Tensor) -> Tensor:
        """Return the tokens (N, T, E) that heads (N, heads, T, E / heads) make."""
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def latest(self, x: Tensor) -> Tensor:
        """Return the last token's attention (N, 1, E) over all of `x`, for the queries of one token."""
        q, k, v = self.heads(x)
        return self.merge((q[:, :, -1:] @ k.transpose(2, 3)).softmax(-1) @ v)


class SingleOutputAttention(_ContinualAttention):
    r"""The newest token's attention over the window (`paper <https://arxiv.org/abs/2201.06268>`_).

    .. math:: y_t = \mathrm{softmax}\Big(\frac{q_t K_{t-n+1:t}^\top}{\sqrt d}\Big) V_{t-n+1:t}

    Keys and values wait in the window, so a token costs four projections and 2 n E multiply-adds. Every step gives
    (N, E): of the clip network over the window, the last token.

    Args:
        embed_dim: E, channels of a token.
        num_heads: heads.
        frames: n, tokens of the window.
        dropout: of the weights, in training on clips.
        bias: of the projections.

    Shapes:
        - clip: :math:`(N, T, E)`
        - token: :math:`(N, E)`

    Raises:
        ValueError: if `embed_dim` is no multiple of `num_heads`.
    """

    whole = False

    def steps(self, frames: list[Tensor]) -> list[Tensor]:
        """Take new tokens and return the attention of each, once the window is full."""
        outputs = []
        for token in frames:
            q, k, v = self.heads(token)
            if self._stream:
                k = torch.cat((self._stream["keys"], k), 2)[:, :, -self.frames :]
                v = torch.cat((self._stream["values"], v), 2)[:, :, -self.frames :]
            self._stream = {"keys": k, "values": v}
            if k.shape[2] == self.frames:
                outputs.append(self.merge((q @ k.transpose(2, 3)).softmax(-1) @ v))
        return outputs


class RetroactiveAttention(_ContinualAttention):
    r"""The attention of all tokens of the window, brought up to date (`paper <https://arxiv.org/abs/2201.06268>`_).

    .. math:: d_i \leftarrow d_i - e^{q_i k_{t-n}} + e^{q_i k_t}, \qquad
              a_i \leftarrow a_i - e^{q_i k_{t-n}} v_{t-n} + e^{q_i k_t} v_t, \qquad
              y_i = a_i / d_i

    A token costs 5 n E multiply-adds besides projections. Every step gives what the clip network gives for the
    window, (N, n, E).

    Args:
        embed_dim: E, channels of a token.
        num_heads: heads.
        frames: n, tokens of the window.
        dropout: of the weights, in training on clips.
        bias: of the projections.

    Shapes:
        - clip: :math:`(N, T, E)`
        - token: :math:`(N, E)`

    Raises:
        ValueError: if `embed_dim` is no multiple of `num_heads`.
    """

    def steps(self, frames: list[Tensor]) -> list[Tensor]:
        """Take new tokens and return the attention of the windows that end with each."""
        outputs = []
        for token in frames:
            self._stream = self._update(self._stream, *self.heads(token))
            if self._stream["keys"].shape[2] == self.frames:
                outputs.append(self.merge(self._stream["sums"] / self._stream["weights"]))
        return outputs

    def _update(self, old: dict[str, Tensor] | None, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        if old is None:
            return self._rows(q, k, v) | {"queries": q, "keys": k, "values": v}
        old = dict(old)
        if old["keys"].shape[2] == self.frames:
            key, value = old["keys"][:, :, :1], old["values"][:, :, :1]
            old = {name: tensor[:, :, 1:] for name, tensor in old.items()}
            left = (old["queries"] @ key.transpose(2, 3) - old["largest"]).exp()
            old["weights"] = old["weights"] - left
            old["sums"] = old["sums"] - left * value
        scores = old["queries"] @ k.transpose(2, 3)
        largest = old["largest"].maximum(scores)
        rescale, come = (old["largest"] - largest).exp(), (scores - largest).exp()
        old["weights"] = old["weights"] * rescale + come
        old["sums"] = old["sums"] * rescale + come * v
        old["largest"] = largest
        queries, keys, values = (
            torch.cat((old[name], new), 2) for name, new in (("queries", q), ("keys", k), ("values", v))
        )
        lost = (old["weights"] < _CANCELLED).any(0).any(0).squeeze(-1)
        if lost.any():
            for name, rows in self._rows(old["queries"][:, :, lost], keys, values).items():
                old[name][:, :, lost] = rows
        rows = self._rows(q, keys, values)
        rows = {name: torch.cat((old[name], row), 2) for name, row in rows.items()}
        return rows | {"queries": queries, "keys": keys, "values": values}

    @staticmethod
    def _rows(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        scores = q @ k.transpose(2, 3)
        largest = scores.amax(-1, keepdim=True)
        weights = (scores - largest).exp()
        return {"largest": largest, "weights": weights.sum(-1, keepdim=True), "sums": weights @ v}


class ContinualTransformerEncoderLayer(Stream, nn.TransformerEncoderLayer):
    """Streaming `torch.nn.TransformerEncoderLayer`: every step gives the window's tokens, (N, n, E).

    Made by `continual` from torch's layer (`batch_first=True`), whose parameters and names it has.
    """

    axis = 1
    whole = True
    self_attn: "RetroactiveAttention | SingleOutputAttention"  # type: ignore[assignment]  # torch's, made to stream
    last_only: bool

    @property
    def span(self) -> Span:
        """The window of the attention."""
        return self.self_attn.span

    def forward(self, src: Tensor) -> Tensor:  # type: ignore[override]  # no masks
        """Encode a clip (N, T, E)."""
        return self.finish(src, self.self_attn(self.enter(src)))

    def latest(self, window: Tensor) -> Tensor:
        """Return the last token (N, 1, E) that `forward` gives, for the cost of one query."""
        return self.finish(window[:, -1:], self.self_attn.latest(self.enter(window)))

    def enter(self, x: Tensor) -> Tensor:
        """Return what the attention sees."""
        return self.norm1(x) if self.norm_first else x

    def finish(self, x: Tensor, attention: Tensor) -> Tensor:
        """Return the layer's output, given its input and the attention of it."""
        x = x + self.dropout1(attention)
        if self.norm_first:
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x)
        return self.norm2(x + self._ff_block(x))

    def steps(self, frames: list[Tensor]) -> list[Tensor]:
        """Take new tokens and return the encoded windows that end with each."""
        outputs = []
        for token in frames:
            tokens = [*(self._stream or []), token][-self.span.length :]
            self._stream = tokens
            for attention in self.self_attn.steps([self.enter(token)]):
                x = torch.cat(tokens, 1)
                outputs.append(self.finish(x[:, -attention.shape[1] :], attention))
        return outputs


class ContinualTransformerEncoder(Stream, nn.TransformerEncoder):
    """Streaming `torch.nn.TransformerEncoder`: the first layer is retroactive, the others see every token anew.

    Made by `continual` from torch's encoder. Where the network reads nothing but the last token, the last layer
    computes that one alone: with one or two layers a step's cost then grows linearly with the window, with more
    it grows quadratically.
    """

    axis = 1
    whole = True
    last_only = False

    @property
    def span(self) -> Span:
        """The window of the first layer."""
        return self._parts()[0].span

    def _parts(self) -> list[ContinualTransformerEncoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, ContinualTransformerEncoderLayer)]

    def forward(self, src: Tensor) -> Tensor:  # type: ignore[override]  # no masks
        """Encode a clip (N, T, E)."""
        for layer in self._parts():
            src = layer(src)
        return src if self.norm is None else self.norm(src)

    def steps(self, frames: list[Tensor]) -> list[Tensor]:
        """Take new tokens and return the encoded windows that end with each, or their last tokens."""
        first, *others = self._parts()
        outputs = first.steps(frames)
        for layer in others:
            latest = self.last_only and layer is others[-1]
            outputs = [layer.latest(window) if latest else layer(window) for window in outputs]
        return outputs if self.norm is None else [self.norm(window) for window in outputs]


class RecyclingPositions(Stream):
    r"""Adds position encodings that are used again after n tokens (`paper <https://arxiv.org/abs/2201.06268>`_).

    .. math:: y_t = x_t + p_{t \bmod n}

    A token keeps its encoding while it moves through the window, so nothing that was computed from it changes. Clips
    begin at the position `start`, which training should draw at random.

    Args:
        frames: n, at least the window of the attention.
        channels: of a token.

    Shapes:
        - clip: :math:`(N, T, E)`
        - output: :math:`(N, T, E)`
    """

    axis = 1
    start = 0

    def __init__(
        self,
        frames: int,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(frames, channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the encodings anew."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, start: int | None = None) -> Tensor:
        """Add the encodings to tokens of which the first has position `start`, by default that of the module."""
        first = self.start if start is None else start
        places = torch.arange(first, first + x.shape[1], device=x.device) % len(self.weight)
        return x + self.weight[places]

    def steps(self, frames: list[Tensor]) -> list[Tensor]:
        """Take new tokens and add the next encodings."""
        place = self.start if self._stream is None else self._stream
        self._stream = (place + len(frames)) % len(self.weight)
        return [self(frame, place + index) for index, frame in enumerate(frames)]


def attention_twin(module: nn.Module) -> type[Stream] | None:
    """Return what streams a layer of torch, or None.

    Raises:
        ValueError: if the layer is one that nothing here streams.
    """
    twins: dict[type[nn.Module], type[Stream]] = {
        nn.TransformerEncoder: ContinualTransformerEncoder,
        nn.TransformerEncoderLayer: ContinualTransformerEncoderLayer,
    }
    twin = twins.get(type(module))
    if twin is None and type(module) is not nn.MultiheadAttention:
        return None
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention):
            if not part.batch_first:
                raise ValueError("its attention must be batch_first=True to stream")
            if not part._qkv_same_embed_dim or part.bias_k is not None or part.add_zero_attn:
                raise ValueError("keys and values must have the tokens' channels and no additional tokens")
    if twin is None:
        raise ValueError(
            "attention streams as RetroactiveAttention or SingleOutputAttention; use one of them"
        )
    return twin


def prepare_attention(module: Any, frames: int, last_only: bool) -> None:
    """Make what stands inside a streaming encoder or encoder layer stream too, in place.

    Args:
        module: an encoder or encoder layer.
        frames: tokens of the window.
        last_only: whether nothing reads any but the last token.
    """
    single = last_only and len(getattr(module, "layers", [module])) == 1
    for part in list(module.modules()):
        if type(part) is nn.TransformerEncoderLayer:
            part.__class__ = ContinualTransformerEncoderLayer  # type: ignore[assignment]  # no state of its own
        if type(part) is nn.MultiheadAttention:
            part.__class__ = SingleOutputAttention if single else RetroactiveAttention  # type: ignore[assignment]
            cast(Any, part).frames = frames
    module.last_only = last_only
