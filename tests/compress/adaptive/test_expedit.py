"""Token clustering: one centre a token is the identity, k-means by a loop, and blocks of every layout."""

import pytest
import torch
from torch import nn

from omniconv.compress.adaptive.expedit import ClusteredBlocks, cluster_tokens, expedite, token_weights
from omniconv.models.dense.segmenter import Segmenter
from omniconv.models.factory import create_model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_clustering_is_a_loop_over_tokens_and_near_centres():
    z, (height, width), tau = tokens(1, 5, 7, 3)[0], (2, 3), 2.0
    s = torch.stack(
        [z[a:b, c:d].mean((0, 1)) for a, b in ((0, 3), (2, 5)) for c, d in ((0, 3), (2, 5), (4, 7))]
    )
    for _ in range(3):
        total, mass = torch.zeros_like(s), torch.zeros(len(s), dtype=s.dtype)
        for i in range(5):
            for j in range(7):
                near = [
                    a * width + b
                    for a in range(height)
                    for b in range(width)
                    if abs(a - i * height // 5) <= 0 and abs(b - j * width // 7) <= 0
                ]
                q = torch.stack([(-(z[i, j] - s[c]).square().sum() / tau).exp() for c in near])
                for weight, c in zip(q / q.sum(), near, strict=True):
                    total[c] += weight * z[i, j]
                    mass[c] += weight
        s = total / mass[:, None]
    found = cluster_tokens(z[None], (height, width), tau, iterations=3, window=1)
    torch.testing.assert_close(found[0].flatten(0, 1), s)


@pytest.mark.parametrize("neighbours", [1, 3, 99])
def test_weights_sum_to_one_over_the_nearest(neighbours):
    z, s = tokens(2, 11, 4), tokens(2, 6, 4) + 0.1
    w = token_weights(z, s, 0.7, neighbours)
    torch.testing.assert_close(w.sum(2), torch.ones(2, 11, dtype=w.dtype))
    distances = torch.cdist(z, s)
    nearest = distances.argsort(2)[:, :, :neighbours]
    assert ((w > 0).sum(2) == min(neighbours, 6)).all()
    assert (w.gather(2, nearest) > 0).all()
    ratio = w.gather(2, nearest[:, :, :1]) / w.gather(2, nearest[:, :, -1:])
    d = distances.gather(2, nearest).square()
    torch.testing.assert_close(ratio, ((d[:, :, -1:] - d[:, :, :1]) / 0.7).exp())


HOSTS = {
    "vit": ("vit_test", ["blocks.1", "blocks.2"], {}),
    "deit": ("deit_test", ["blocks.0", "blocks.1"], {"prefix_tokens": 2}),
    "twins": ("twins_test", ["blocks.0.1"], {"channels_last": True}),
    "resnet": ("resnet_test", ["layer2.1"], {}),
}


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_one_centre_a_token_and_no_temperature_is_the_network_itself(host):
    name, blocks, options = HOSTS[host]
    torch.manual_seed(0)
    depth = {"depth": 4} if host == "vit" else {}
    model = create_model(name, num_classes=5, **depth).double().eval()
    x = tokens(2, 3, 48, 48)
    same, report = expedite(model, blocks, scale=1.0, temperature=1e-6, **options)
    torch.testing.assert_close(same(x), model(x), rtol=1e-9, atol=1e-9)
    assert report.before.parameters == report.after.parameters
    fast, _ = expedite(model, blocks, scale=0.5, **options)
    assert fast(x).shape == model(x).shape
    assert not torch.allclose(fast(x), model(x))
    torch.testing.assert_close(fast(x[1:]), fast(x)[1:])


@torch.no_grad()
def test_a_segmenter_of_images_that_are_not_square():
    torch.manual_seed(0)
    model = Segmenter(create_model("vit_test", depth=4, patch_size=8), 3).eval()
    x = tokens(1, 3, 64, 96).float()
    blocks = ["encoder.blocks.1", "encoder.blocks.2"]
    fast, report = expedite(model, blocks, scale=0.5, grid=(8, 12), input_shape=(3, 64, 96))
    assert fast(x).shape == (1, 3, 64, 96)
    assert report.after.macs < report.before.macs
    with pytest.raises(ValueError, match="96 tokens do not fill 10 rows of 10"):
        expedite(model, blocks)[0](x)


def test_gradients_reach_the_tokens_and_the_blocks():
    block = nn.Linear(3, 3).double()
    x = tokens(2, 16, 3).requires_grad_()
    ClusteredBlocks([block], 0.5)(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert block.weight.grad.isfinite().all()
    constant = torch.zeros(1, 16, 3, dtype=torch.float64)
    assert ClusteredBlocks([nn.Identity()], 0.5)(constant).isfinite().all()


def test_errors():
    model = create_model("vit_test", depth=4)
    for blocks in ([], ["blocks.0", "blocks.2"], ["blocks.9"]):
        with pytest.raises(ValueError, match="blocks must follow each other in one container"):
            expedite(model, blocks)
    with pytest.raises(ValueError, match=r"scale must lie in \(0, 1\]: got 2"):
        expedite(model, ["blocks.0"], scale=2)
    with pytest.raises(ValueError, match="window must be odd: got 4"):
        expedite(model, ["blocks.0"], window=4)
    with pytest.raises(ValueError, match="blocks must keep the shape"):
        expedite(create_model("resnet_test"), ["layer2.0"])[0](torch.zeros(1, 3, 32, 32))
