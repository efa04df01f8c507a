"""Spatio-temporal graph convolution for skeletons, which streams as CoST-GCN does.

Papers: Yan et al., Spatial Temporal Graph Convolutional Networks for Skeleton-Based Action Recognition,
https://arxiv.org/abs/1801.07455, and Hedegaard, Efficient Online Processing with Deep Neural Networks,
https://arxiv.org/abs/2306.13474, which takes padding (and stride) over time away and aligns the shortcut instead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omniconv.deploy.continual.container import Residual

__all__ = ["GraphConv", "STGCNBlock", "skeleton_partitions"]


def skeleton_partitions(bones: Sequence[tuple[int, int]], joints: int, centre: int = 0) -> Tensor:
    """Return the normalised adjacency (3, V, V) of a skeleton: each joint, those nearer to the centre, those farther.

    Args:
        bones: pairs of joints.
        joints: V.
        centre: the joint that distances are counted from.

    Raises:
        ValueError: if a joint is not connected with the centre.
    """
    linked = torch.eye(joints)
    for a, b in bones:
        linked[a, b] = linked[b, a] = 1
    far = torch.full((joints,), -1)
    far[centre] = 0
    for step in range(1, joints):
        reached = (linked[:, far >= 0].sum(1) > 0) & (far < 0)
        far[reached] = step
    if (far < 0).any():
        raise ValueError(
            f"bones must connect every joint with the centre: {int((far < 0).argmax())} is apart"
        )
    normal = linked / linked.sum(0)
    difference = far[:, None] - far[None, :]
    own = torch.eye(joints, dtype=torch.bool)
    # Two joints of one bone can be equally far only in a ring; they count as farther.
    return torch.stack([normal * part for part in (own, difference < 0, (difference >= 0) & ~own)])


class GraphConv(nn.Module):
    r"""Convolution over the joints of a skeleton (`paper <https://arxiv.org/abs/1801.07455>`_).

    .. math:: y = \sum_k W_k\, x\, (A_k \odot M_k)

    Args:
        in_channels, out_channels: of a joint.
        adjacency: A, (K, V, V); column w says which joints reach joint w.

    Shapes:
        - input: :math:`(N, C, T, V)`
        - output: :math:`(N, C', T, V)`

    Raises:
        ValueError: if `adjacency` is not a stack of square matrices.
    """

    adjacency: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        adjacency: Tensor,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if adjacency.ndim != 3 or adjacency.shape[1] != adjacency.shape[2]:
            raise ValueError(f"adjacency must be (K, V, V): got {tuple(adjacency.shape)}")
        parts = len(adjacency)
        self.out_channels = out_channels
        self.conv = nn.Conv2d(in_channels, out_channels * parts, 1, device=device, dtype=dtype)
        self.register_buffer("adjacency", adjacency.to(device=device, dtype=self.conv.weight.dtype))
        self.edges = nn.Parameter(torch.empty(adjacency.shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the channels' weights anew; every edge counts as one."""
        self.conv.reset_parameters()
        nn.init.ones_(self.edges)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolved clip."""
        parts = self.conv(x).unflatten(1, (-1, self.out_channels))
        return torch.einsum("nkctv,kvw->nctw", parts, self.adjacency * self.edges)


class STGCNBlock(nn.Module):
    r"""Graph convolution over joints, then a convolution over time, beside a shortcut.

    .. math:: y = \mathrm{ReLU}(\mathrm{BN}(w * \mathrm{ReLU}(\mathrm{BN}(G x))) + g(x))

    with :math:`G` of `GraphConv` (`paper <https://arxiv.org/abs/1801.07455>`_). Without padding the shortcut is
    cropped to the middle of what the convolution leaves (`Residual`).

    Args:
        in_channels, out_channels: of a joint.
        adjacency: (K, V, V).
        kernel_size: taps over time, odd.
        stride: over time.
        padding: zeros over time at each end; half the kernel, 4, in ST-GCN, none in CoST-GCN.
        residual: whether there is a shortcut; the first block of the network has none.

    Shapes:
        - input: :math:`(N, C, T, V)`
        - output: :math:`(N, C', T', V)`

    Raises:
        ValueError: if `kernel_size` is even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        adjacency: Tensor,
        *,
        kernel_size: int = 9,
        stride: int = 1,
        padding: int = 0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd: got {kernel_size}")
        temporal = nn.Conv2d(out_channels, out_channels, (kernel_size, 1), (stride, 1), (padding, 0))
        fn = nn.Sequential(
            GraphConv(in_channels, out_channels, adjacency),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            temporal,
            nn.BatchNorm2d(out_channels),
        )
        shortcut = None
        if in_channels != out_channels or stride > 1:
            shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, (stride, 1)), nn.BatchNorm2d(out_channels)
            )
        self.block = Residual(fn, shortcut) if residual else fn
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for a clip."""
        return self.act(self.block(x))
