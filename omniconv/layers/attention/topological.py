"""Linear attention under a mask that is a learned function of the distance on a tree.

Paper: Choromanski et al., Fast Tree-Field Integrators, https://arxiv.org/abs/2406.15881: topological transformers.
What differs: the mask's exponent has no constant, which would cancel between numerator and denominator, and a cubic
term instead; queries and keys are made positive by elu + 1, as in https://arxiv.org/abs/2006.16236.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.cases import Case, Raises
from omniconv.ops.tree_field.api import tree_field
from omniconv.ops.tree_field.functions import ExponentiatedPolynomial
from omniconv.ops.tree_field.tree import IntegratorTree, spanning_tree

__all__ = ["TopologicalAttention"]


def _grid_tree(height: int, width: int) -> IntegratorTree:
    """Return a minimum spanning tree of the grid whose neighbours are one apart."""
    place = torch.arange(height * width).reshape(height, width)
    across = torch.stack([place[:, :-1].flatten(), place[:, 1:].flatten()], 1)
    down = torch.stack([place[:-1].flatten(), place[1:].flatten()], 1)
    edges = torch.cat([across, down])
    return IntegratorTree.of(*(spanning_tree(edges, torch.ones(len(edges))) if len(edges) else (edges,)))


class TopologicalAttention(nn.Module):
    r"""Linear attention of `topological transformers <https://arxiv.org/abs/2406.15881>`_.

    .. math:: y_i = \frac{\sum_j M_{ij}\, \varphi(q_i)^\top \varphi(k_j)\, v_j}
        {\sum_j M_{ij}\, \varphi(q_i)^\top \varphi(k_j)}, \qquad
        M_{ij} = \exp\big(a_1 z_{ij} + a_2 z_{ij}^2 + a_3 z_{ij}^3\big)

    where :math:`z_{ij}` is the distance on a minimum spanning tree of the grid of tokens, in units of H + W, and
    :math:`\varphi = \mathrm{elu} + 1`. All heads share the three parameters a. The mask is never formed: the sums
    over j are integrals over the tree, in time near-linear in the number of tokens.

    Args:
        dim: features C of a token.
        size: H and W, the grid of tokens, row by row.
        num_heads: heads; must divide `dim`.
        device, dtype: of the parameters.

    Shapes:
        - input and output: :math:`(N, H W, C)`

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or the tokens are not those of the grid.
    """

    def __init__(
        self, dim: int, size: tuple[int, int], num_heads: int = 8, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads: got {dim} and {num_heads}")
        self.size, self.num_heads = size, num_heads
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.mask = nn.Parameter(torch.empty(3, device=device, dtype=dtype))
        self._plant()
        nn.init.zeros_(self.mask)

    def _plant(self) -> None:
        with torch.device("cpu"):
            self._tree = _grid_tree(*self.size)
        for name, tensor in self._tree.tensors().items():
            self.register_buffer(name, tensor.to(self.mask.device), persistent=False)

    def reset_parameters(self) -> None:
        """Draw new weights; the mask starts as ones, as without it."""
        self.qkv.reset_parameters()
        self.proj.reset_parameters()
        nn.init.zeros_(self.mask)
        self._plant()

    @property
    def tree(self) -> IntegratorTree:
        """The spanning tree, on the layer's device."""
        return self._tree.holding({name: self.get_buffer(name) for name in self._tree.tensors()})

    def mask_function(self) -> ExponentiatedPolynomial:
        """Return M as a function of the distance on the tree."""
        units = float(sum(self.size)) ** torch.arange(1, 4, device=self.mask.device)
        return ExponentiatedPolynomial(torch.cat([self.mask.new_zeros(1), self.mask / units]))

    def forward(self, x: Tensor) -> Tensor:
        """Let the tokens of `x` attend to each other."""
        if x.shape[1] != self.size[0] * self.size[1]:
            raise ValueError(
                f"tokens must be the {self.size[0]} x {self.size[1]} of the grid: got {x.shape[1]}"
            )
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        # A column of ones carries the denominator along.
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        pairs = (k[..., None] * v[..., None, :]).flatten(3)
        sums = tree_field(pairs, self.tree, self.mask_function()).unflatten(3, (-1, v.shape[-1]))
        y = torch.einsum("bhni,bhnij->bhnj", q, sums)
        return self.proj((y[..., :-1] / y[..., -1:]).transpose(1, 2).flatten(2))


CASES = (
    Case(
        TopologicalAttention,
        {"dim": 8, "size": (5, 7), "num_heads": 2},
        inputs=((2, 35, 8),),
        output=(2, 35, 8),
        vary=(0,),
        raises=(
            Raises(
                ValueError,
                "dim must be divisible by num_heads: got 9 and 2",
                {"dim": 9},
            ),
            Raises(
                ValueError,
                "tokens must be the 5 x 7 of the grid: got 36",
                inputs=((2, 36, 8),),
            ),
        ),
    ),
    Case(
        TopologicalAttention,
        {"dim": 4, "size": (3, 1), "num_heads": 1},
        inputs=((2, 3, 4),),
        output=(2, 3, 4),
        id="few-tokens",
        vary=(0,),
    ),
)
