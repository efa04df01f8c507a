"""Squeeze and excitation for segmentation: gates of channels, of pixels, and of both at once.

Paper: Roy et al., Recalibrating Fully Convolutional Networks with Spatial and Channel 'Squeeze & Excitation' Blocks,
https://arxiv.org/abs/1808.08127. `insert_gates` puts one behind every block of a network; the networks of the paper
are in `omniconv.models.dense.fcnn`.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises

__all__ = ["CSE", "SCSE", "SSE", "insert_gates"]

M = TypeVar("M", bound=nn.Module)

_MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "max": torch.maximum,
    "add": torch.add,
    "product": torch.mul,
    "concat": lambda a, b: torch.cat((a, b), 1),
}


class CSE(nn.Module):
    r"""Channel gate (cSE) of `Recalibrating Fully Convolutional Networks <https://arxiv.org/abs/1808.08127>`_.

    .. math:: y_c = x_c \cdot \sigma\bigl(W_2\, \delta(W_1 z + b_1) + b_2\bigr)_c, \qquad
              z_c = \operatorname{mean}_p x_{cp}

    with the mean over all pixels p and :math:`\delta = \mathrm{ReLU}`.

    Args:
        channels: C, of the input.
        reduction: r; :math:`W_1` is :math:`C / r \times C`.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, \ldots)` with one to three axes of pixels or voxels

    Raises:
        ValueError: if `reduction` is not between 1 and `channels`.
    """

    def __init__(self, channels: int, reduction: int = 2, *, device=None, dtype=None) -> None:
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie between 1 and channels: got {reduction} and {channels}")
        self.fc1 = nn.Linear(channels, channels // reduction, device=device, dtype=dtype)
        self.fc2 = nn.Linear(channels // reduction, channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel of `x` by its gate."""
        axes = tuple(range(2, x.ndim))
        gates = self.fc2(self.fc1(x.mean(axes)).relu()).sigmoid()
        return x * gates[(..., *[None] * len(axes))]


class SSE(nn.Module):
    r"""Pixel gate (sSE) of `Recalibrating Fully Convolutional Networks <https://arxiv.org/abs/1808.08127>`_.

    .. math:: y_p = x_p \cdot \sigma(\langle w, x_p \rangle + b)

    for the C channels :math:`x_p` of every pixel p.

    Args:
        channels: C, of the input.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, C, \ldots)` with one to three axes of pixels or voxels
    """

    def __init__(self, channels: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights as a 1x1 convolution of C channels draws them."""
        bound = self.weight.numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Scale every pixel of `x` by its gate."""
        scores = torch.einsum("nc...,c->n...", x, self.weight) + self.bias
        return x * scores.sigmoid().unsqueeze(1)


class SCSE(nn.Module):
    r"""Gate of channels and pixels (scSE) of `Recalibrating F-CNNs <https://arxiv.org/abs/1808.08127>`_.

    .. math:: y = \operatorname{merge}\bigl(\mathrm{cSE}(x),\; \mathrm{sSE}(x)\bigr)

    Args:
        channels: C, of the input.
        reduction: r of the channel gate.
        merge: "max" of both, which the authors' code takes, "add", "product" or "concat".
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, \ldots)` with one to three axes of pixels or voxels
        - output: the same, with :math:`2 C` channels if `merge` is "concat"

    Raises:
        ValueError: if `merge` is unknown, or `reduction` is not between 1 and `channels`.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 2,
        *,
        merge: Literal["max", "add", "product", "concat"] = "max",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if merge not in _MERGES:
            raise ValueError(f"merge must be one of {', '.join(_MERGES)}: got {merge!r}")
        self.merge = merge
        self.cse = CSE(channels, reduction, device=device, dtype=dtype)
        self.sse = SSE(channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.cse.reset_parameters()
        self.sse.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` by both gates and merge the results."""
        return _MERGES[self.merge](self.cse(x), self.sse(x))


def insert_gates(
    model: M, images: Tensor, names: Sequence[str], make: Callable[[int], nn.Module] = SCSE
) -> M:
    """Return a copy of a network with a gate behind each of some of its blocks.

    Args:
        model: the network; it is left as it is.
        images: a batch that it takes, from which the channels that each block puts out are read.
        names: dotted names of the blocks, for example all encoder, bottleneck and decoder blocks.
        make: makes the gate of so many channels; it must put out as many.
    """
    channels: dict[str, int] = {}
    seen = copy.deepcopy(model).eval()
    for name in names:

        def record(module: nn.Module, inputs: object, output: Tensor, name: str = name) -> None:
            channels[name] = output.shape[1]

        seen.get_submodule(name).register_forward_hook(record)
    with torch.no_grad():
        seen(images)
    model = copy.deepcopy(model)
    for name in names:
        block = model.get_submodule(name)
        gate = make(channels[name]).to(images.device)
        model.set_submodule(name, nn.Sequential(block, gate.train(block.training)))
    return model


CASES = (
    Case(
        CSE,
        {"channels": 12},
        inputs=((2, 12, 7, 5),),
        output=(2, 12, 7, 5),
        minimal=(1, 12, 1, 1),
        raises=(
            Raises(
                ValueError,
                "reduction must lie between 1 and channels: got 8 and 4",
                {"channels": 4, "reduction": 8},
            ),
        ),
    ),
    Case(SSE, {"channels": 12}, inputs=((2, 12, 7, 5),), output=(2, 12, 7, 5), minimal=(1, 12, 1, 1)),
    Case(
        SCSE,
        {"channels": 6},
        inputs=((2, 6, 7, 5),),
        output=(2, 6, 7, 5),
        minimal=(1, 6, 1, 1),
        raises=(
            Raises(
                ValueError,
                "merge must be one of max, add, product, concat: got 'mean'",
                {"channels": 4, "merge": "mean"},
            ),
        ),
    ),
    Case(
        SCSE,
        {"channels": 6, "reduction": 3, "merge": "concat"},
        inputs=((2, 6, 3, 7, 5),),
        output=(2, 12, 3, 7, 5),
        id="volume",
        vary=(0, 2, 3, 4),
        minimal=(1, 6, 1, 1, 1),
    ),
)
