"""The block against its equation, and one compiled kernel against its layers."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.models.factory import create_model
from omniconv.models.image.convfirst import ConvFirstBlock, ConvFirstConfig
from omniconv.ops.convfirst.api import convfirst, convfirst_tiled


def block(channels=16, kernel=3, group_width=8):
    torch.manual_seed(0)
    made = ConvFirstBlock(
        channels, ConvFirstConfig((1,), (channels,), group_width=group_width, expansion=3, kernel_size=kernel)
    )
    for norm in (made.norm1, made.norm2, made.norm3):
        torch.nn.init.normal_(norm.bias)
        torch.nn.init.normal_(norm.running_mean)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    return made.eval()


@pytest.mark.parametrize(
    ("channels", "kernel", "group_width", "size", "tile"),
    [(16, 3, 8, (13, 9), (4, 5)), (12, 5, 4, (7, 11), (8, 16)), (6, 3, 1, (5, 3), (1, 2))],
)
@torch.no_grad()
def test_one_kernel_gives_what_the_layers_give_and_counts_what_it_moves(
    channels, kernel, group_width, size, tile
):
    made = block(channels, kernel, group_width)
    x = torch.randn(2, channels, *size)
    weights = made.folded()
    torch.testing.assert_close(convfirst(x, weights), made(x), rtol=1e-5, atol=1e-5)
    y, moved = convfirst_tiled(x, weights, tile=tile)
    torch.testing.assert_close(y, made(x), rtol=1e-5, atol=1e-5)
    held = sum(getattr(weights, name).numel() for name in weights.__dataclass_fields__)
    seen = torch.zeros(size)
    count = 0
    for top in range(0, size[0], tile[0]):
        for left in range(0, size[1], tile[1]):
            reach = kernel // 2
            part = seen[
                max(0, top - reach) : top + tile[0] + reach, max(0, left - reach) : left + tile[1] + reach
            ]
            count += held + channels * part.numel()
    assert moved == 2 * (count + channels * seen.numel())


def test_the_block_is_the_papers_equation():
    made = block().double()
    x = torch.randn(1, 16, 6, 5, dtype=torch.float64)

    def norm(y, bn):
        return (y - bn.running_mean[:, None, None]) / (bn.running_var + bn.eps).sqrt()[
            :, None, None
        ] * bn.weight[:, None, None] + bn.bias[:, None, None]

    padded = F.pad(x, (1, 1, 1, 1))
    g = torch.zeros_like(x)
    for group in range(2):
        part = slice(8 * group, 8 * group + 8)
        for u in range(3):
            for v in range(3):
                g[:, part] += torch.einsum(
                    "oc,nchw->nohw", made.conv.weight[part, :, u, v], padded[:, part, u : u + 6, v : v + 5]
                )
    hidden = norm(
        torch.einsum("ec,nchw->nehw", made.expand.weight[:, :, 0, 0], norm(g, made.norm1)), made.norm2
    ).relu()
    wanted = x + norm(torch.einsum("ce,nehw->nchw", made.project.weight[:, :, 0, 0], hidden), made.norm3)
    torch.testing.assert_close(made(x), wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: create_model("convfirstnet_test", group_width=5),
            "widths must be multiples of group_width 5",
        ),
        (lambda: create_model("convfirstnet_test", kernel_size=4), "kernel_size must be odd: got 4"),
        (
            lambda: convfirst_tiled(torch.randn(1, 16, 4, 4), block().folded(), tile=(0, 3)),
            r"tile must be positive: got \(0, 3\)",
        ),
        (
            lambda: convfirst_tiled(torch.randn(1, 16, 4, 4).half(), block().folded()),
            "tiles cannot be computed: it is for float32",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
