import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.compress.merge.datamux import (
    ConvMultiplexer,
    DataMux,
    IndexDemultiplexer,
    MLPDemultiplexer,
    Multiplexer,
    retrieval_loss,
)
from omniconv.models.factory import create_model


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal", "mask"])
def test_a_mixture_is_the_mean_of_the_maps(kind):
    mux = Multiplexer(3, 6, kind)
    x = torch.randn(2, 3, 6, 5)
    maps = [m if m.ndim == 2 else m.diag() for m in mux.maps]
    assert torch.allclose(mux(x), sum(maps[i] @ x[:, i] for i in range(3)) / 3, atol=1e-6)
    if kind == "orthogonal":
        assert all(torch.allclose(m.T @ m, torch.eye(6), atol=1e-5) for m in maps)
    heard = torch.stack([3 * maps[i].T @ mux(x) for i in range(3)], 1)
    assert torch.allclose(mux.separate(mux(x)), heard, atol=1e-5)


def test_masks_separate_without_a_trace_of_the_others():
    mux = Multiplexer(4, 8, "mask")
    x = torch.randn(3, 4, 8)
    own = mux.maps.bool().expand(3, 4, 8)
    assert torch.equal(mux.separate(mux(x))[own], x[own])


def test_convolutions_mix_images():
    mux = ConvMultiplexer(2, 3, 5)
    x = torch.randn(2, 2, 3, 6, 7)
    w, b = mux.maps.weight.chunk(2), mux.maps.bias.chunk(2)
    wanted = sum(F.conv2d(x[:, i], w[i], b[i], padding=1).tanh() for i in range(2)) / 2
    assert torch.allclose(mux(x), wanted, atol=1e-6)


def test_demultiplexers_are_their_networks():
    h = torch.randn(2, 4, 5)
    mlp = MLPDemultiplexer(3, 4, 6, 7)
    first, second = mlp.first.weight.chunk(3), mlp.second.weight.chunk(3)
    for i in range(3):
        hidden = F.gelu(first[i] @ h + mlp.first.bias.chunk(3)[i][:, None])
        wanted = second[i][..., 0] @ hidden + mlp.second.bias.chunk(3)[i][:, None]
        assert torch.allclose(mlp(h)[:, i], wanted, atol=1e-6)
    index = IndexDemultiplexer(3, 4, 6, 7)
    for i in range(3):
        both = torch.cat([h, index.places[i, :, None].expand_as(h)], 1)
        wanted = index.second(F.gelu(index.first(both.mT))).mT
        assert torch.allclose(index(h)[:, i], wanted, atol=1e-6)
    assert mlp(h[..., 0]).shape == index(h[..., 0]).shape == (2, 3, 6)
    assert torch.allclose(mlp(h[..., 0]), mlp(h)[..., 0], atol=1e-6)
    assert torch.allclose(index(h[..., 0]), index(h)[..., 0], atol=1e-6)


def test_permuted_with_their_places_inputs_have_permuted_outputs():
    model = DataMux(nn.Linear(6, 5), Multiplexer(3, 6), IndexDemultiplexer(3, 5, 2))
    x = torch.randn(6, 6)
    wanted = model(x)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        model.mux.maps.copy_(model.mux.maps[order])
        model.demux.places.copy_(model.demux.places[order])
    permuted = model(x.unflatten(0, (2, 3))[:, order].flatten(0, 1)).unflatten(0, (2, 3))
    assert torch.allclose(permuted, wanted.unflatten(0, (2, 3))[:, order], atol=1e-6)


def test_any_batch_of_a_backbone_with_few_runs():
    rows = []
    base = create_model("resnet_test", num_classes=0)
    base.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    features = base(torch.zeros(1, 3, 32, 32)).shape[1]
    model = DataMux(base, ConvMultiplexer(4, 3, 3), MLPDemultiplexer(4, features, 10)).eval()
    x = torch.randn(7, 3, 32, 32)
    assert model(x).shape == (7, 10)
    assert rows[-1] == 2
    assert model.ensemble(x).shape == (7, 10)
    assert torch.allclose(
        model.ensemble(x[:1]), model(x[:1].expand(4, -1, -1, -1)).mean(0, keepdim=True), atol=1e-5
    )


def test_a_prefix_shows_the_base_the_places():
    class Seen(nn.Module):
        def forward(self, x):
            self.x = x
            return x

    base = Seen()
    model = DataMux(base, Multiplexer(2, 4, "mask"), IndexDemultiplexer(2, 4, 3), prefix=4)
    x = torch.randn(4, 4, 5)
    y = model(x)
    own, other, common = model.tokens
    first, second = model.mux.maps
    assert torch.allclose(base.x[0, :, 0], (first * own + second * common) / 2)
    assert torch.allclose(base.x[0, :, 1], (first * common + second * other) / 2)
    content, places = base.x[..., 2:], base.x[..., :2].mT
    assert torch.allclose(y, model.demux(content, places).flatten(0, 1))
    assert y.shape == (4, 3, 5)


def test_retrieval_asks_for_one_token_a_step():
    tokens = torch.randint(9, (6, 50))
    sure = 50.0 * F.one_hot(tokens, 9).movedim(-1, 1).float()
    assert retrieval_loss(sure, tokens, 3).item() < 1e-6
    # Right for the first two of three inputs, wrong for the last.
    sure[2::3] = 0
    assert 0.1 < retrieval_loss(sure, tokens, 3).item() < 0.7 * torch.log(torch.tensor(9.0))


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="count must divide channels for masks: got 3 and 8"):
        Multiplexer(3, 8, "mask")
    with pytest.raises(ValueError, match="kind must be 'hadamard', 'orthogonal' or 'mask': got 'sum'"):
        Multiplexer(3, 8, "sum")
    with pytest.raises(ValueError, match="mux and demux must be for as many inputs: got 2 and 3"):
        DataMux(nn.Identity(), Multiplexer(2, 8), MLPDemultiplexer(3, 8, 2))
    with pytest.raises(ValueError, match="a prefix is for an IndexDemultiplexer"):
        DataMux(nn.Identity(), Multiplexer(2, 8), MLPDemultiplexer(2, 8, 2), prefix=8)
