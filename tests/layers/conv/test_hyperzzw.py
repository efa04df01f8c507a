"""The operators of HyperZ.Z.W against loops, and what the paper says of the block and the network."""

from typing import cast

import pytest
import torch
from torch import nn

from omniconv.layers.conv.hyperzzw import SlowFastBlock, global_hyperzzw, local_hyperzzw
from omniconv.layers.conv.terminator import Terminator


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("height", "width"), [(5, 5), (4, 6), (7, 3), (1, 1)])
def test_global_products_of_images(height, width):
    x, mixed, kernel = draw(2, 3, height, width), draw(2, 3, height, width) + 1, draw(3, height, width)
    expected = torch.zeros_like(x)
    for n in range(2):
        for c in range(3):
            for i in range(height):
                for j in range(width):
                    # Beyond its edges a map is zero.
                    for inner in range(min(height, width)):
                        weight = kernel[c, i, inner] * x[n, c, i, inner]
                        expected[n, c, i, j] += weight * mixed[n, c, inner, j]
    torch.testing.assert_close(global_hyperzzw(x, mixed, kernel), expected)


@pytest.mark.parametrize("length", [1, 9, 11, 17])
def test_global_products_of_sequences(length):
    x, mixed, kernel = draw(2, 3, length), draw(2, 3, length) - 1, draw(3, length)
    side = next(s for s in range(1, 9) if s * s >= length)
    expected = torch.zeros_like(x)
    for t in range(length):
        row, column = divmod(t, side)
        for inner in range(side):
            first, second = row * side + inner, inner * side + column
            if first < length and second < length:
                expected[..., t] += kernel[:, first] * x[..., first] * mixed[..., second]
    torch.testing.assert_close(global_hyperzzw(x, mixed, kernel), expected)


def test_local_kernels_belong_to_their_sample():
    x, kernel = draw(3, 2, 6, 9), draw(2, 3, 5)
    y = local_hyperzzw(x, kernel)
    for n in range(3):
        # Areas of 6 x 9 that 3 x 5 cells cover: rows two by two, columns as torch divides them.
        context = nn.functional.adaptive_avg_pool2d(x[n], (3, 5))
        torch.testing.assert_close(context[:, 0, 0], x[n, :, :2, :2].mean((1, 2)))
        weight = (kernel * (1 + context))[:, None]
        expected = nn.functional.conv2d(x[n : n + 1], weight, padding=(1, 2), groups=2)
        torch.testing.assert_close(y[n : n + 1], expected)


def block(**options) -> SlowFastBlock:
    torch.manual_seed(0)
    return SlowFastBlock(2, 4, **options).double()


@pytest.mark.parametrize(("axes", "shape"), [(1, (1, 2, 13)), (2, (1, 2, 5, 6))])
def test_every_output_depends_on_every_input(axes, shape):
    layer = block(axes=axes).eval()
    x = draw(*shape)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x), x)
    assert (jacobian != 0).all()


def test_weights_depend_on_the_context():
    layer = block().eval()
    first, second = (torch.autograd.functional.jacobian(lambda x: layer(x), draw(1, 2, 4, n)) for n in (5, 5))
    torch.testing.assert_close(first, second)
    other = torch.autograd.functional.jacobian(lambda x: layer(x), draw(1, 2, 4, 5).flip(3))
    assert (first - other).abs().max() > 0.01


def test_channels_have_zero_mean_before_the_nonlinearity(monkeypatch):
    layer = block().train()
    seen = []
    monkeypatch.setattr(nn.functional, "gelu", lambda y: seen.append(y) or y)
    layer(draw(3, 2, 6, 5))
    (y,) = seen
    assert y[:, :2].mean((2, 3)).abs().max() < 1e-10
    assert y[:, 2:].mean((0, 2, 3)).abs().max() < 1e-10


def test_local_feedback_reaches_the_slow_network_alone():
    layer = block()
    layer.slow_loss(layer(draw(2, 2, 5, 6))).backward()
    assert all(p.grad is not None for p in layer.slow.parameters())
    others = [p for name, p in layer.named_parameters() if not name.startswith("slow.")]
    assert all(p.grad is None for p in others)


def test_blocks_read_the_two_before_them():
    torch.manual_seed(0)
    network = Terminator(1, 3, channels=4, depth=4).double().eval()
    x = draw(2, 1, 6, 6)
    y = network.features(x)
    assert len(y) == 4
    torch.testing.assert_close(y[3], network.blocks.get_submodule("3")(torch.cat([y[1], y[2]], 1)))
    torch.testing.assert_close(y[1], network.blocks.get_submodule("1")(y[0]))
    logits, feedback = network.forward_with_slow_loss(x)
    torch.testing.assert_close(logits, network(x))
    losses = [cast(SlowFastBlock, block).slow_loss(o) for block, o in zip(network.blocks, y, strict=True)]
    torch.testing.assert_close(feedback, torch.stack(losses).mean())
