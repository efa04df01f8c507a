"""PKCAM: channel attention that also reads what earlier layers pooled.

Paper: Bakr et al., PKCAM: Previous Knowledge Channel Attention Module, https://arxiv.org/abs/2211.07521. The form is
that of the official code, which is called EMCA there. In the residual networks (`gate="pkcam"`) the first block of
each stage has one and reads the stem and the last block of every earlier stage.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from omniconv.core.cases import Case, Raises
from omniconv.layers.attention.eca import eca_kernel_size

__all__ = ["PKCAM"]


def _excitation(kind: str, channels: int, device, dtype) -> nn.Module:
    """Return what maps pooled channels (N, 1, C) to scores of the same shape."""
    if kind == "eca":
        k = eca_kernel_size(channels)
        return nn.Conv1d(1, 1, k, padding=k // 2, bias=False, device=device, dtype=dtype)
    reduced = max(1, channels // 16)
    return nn.Sequential(
        nn.Linear(channels, reduced, bias=False, device=device, dtype=dtype),
        nn.ReLU(),
        nn.Linear(reduced, channels, bias=False, device=device, dtype=dtype),
    )


class PKCAM(nn.Module):
    r"""Gate of `PKCAM <https://arxiv.org/abs/2211.07521>`_, which sees S vectors of earlier layers.

    .. math:: y = x \cdot \bigl(1 + \sigma(u_1\, \sigma(e_l(z)) + u_2\, \sigma(e_g(\delta(v_0 p_1 + \ldots
              + v_{S-1} p_S + v_S z))))\bigr)

    where z holds the means of the channels of x, :math:`p_i` those of an earlier layer, repeated up to C channels,
    :math:`e_l` and :math:`e_g` are excitations as in ECA or SE, and :math:`\delta = \mathrm{ReLU}`.

    Args:
        channels: C, of the input.
        layers: S.
        excitation: "eca", one kernel along the channels, or "se", a bottleneck of C / 16.
        device, dtype: of the parameters.

    Shapes:
        - input: :math:`(N, C, H, W)`, and S vectors :math:`(N, C_i)` with :math:`C_i` a divisor of C
        - output: :math:`(N, C, H, W)`

    Raises:
        ValueError: if an earlier layer's channels do not divide C, or `excitation` is unknown.
    """

    def __init__(
        self,
        channels: int,
        layers: int,
        excitation: Literal["eca", "se"] = "eca",
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if excitation not in ("eca", "se"):
            raise ValueError(f"excitation must be 'eca' or 'se': got {excitation!r}")
        self.local = _excitation(excitation, channels, device, dtype)
        self.broad = _excitation(excitation, channels, device, dtype)
        # The authors' convolution whose kernel and stride are the number of rows, which Linear computes faster.
        self.input_fusion = nn.Linear(layers + 1, 1, bias=False, device=device, dtype=dtype)
        self.output_fusion = nn.Linear(2, 1, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Linear):
                module.reset_parameters()

    def forward(self, *inputs: Tensor) -> Tensor:
        """Scale every channel of the first input by one and a gate; the others are the S vectors."""
        x, *earlier = inputs
        z = x.mean((2, 3))
        for vector in earlier:
            if z.shape[1] % vector.shape[1]:
                raise ValueError(
                    "the channels of an earlier layer must divide those of the input: "
                    f"got {vector.shape[1]} and {z.shape[1]}"
                )
        rows = [vector.repeat(1, z.shape[1] // vector.shape[1]) for vector in earlier]
        fused = self.input_fusion(torch.stack((*rows, z), 2)).relu()
        scores = torch.cat((self.local(z.unsqueeze(1)), self.broad(fused.mT)), 1).sigmoid()
        return x * (1 + self.output_fusion(scores.mT).sigmoid().unsqueeze(3))


CASES = (
    Case(
        PKCAM,
        {"channels": 12, "layers": 2},
        inputs=((2, 12, 7, 5), (2, 4), (2, 12)),
        output=(2, 12, 7, 5),
        raises=(
            Raises(
                ValueError,
                "the channels of an earlier layer must divide those of the input: got 5 and 12",
                inputs=((2, 12, 7, 5), (2, 5), (2, 12)),
            ),
        ),
    ),
    Case(
        PKCAM,
        {"channels": 32, "layers": 1, "excitation": "se"},
        inputs=((2, 32, 3, 5), (2, 8)),
        output=(2, 32, 3, 5),
        id="se",
        raises=(
            Raises(
                ValueError,
                "excitation must be 'eca' or 'se': got 'srm'",
                {"channels": 32, "layers": 1, "excitation": "srm"},
            ),
        ),
    ),
)
