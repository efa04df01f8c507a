"""NViT: five widths go as if they had been masked, scores are derivatives of the loss, the latency is reached."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.compress.prune.nvit import Widths, nvit, saliency
from omniconv.models.image.vit import VisionTransformer, ViTConfig
from omniconv.testing.harness import randomize, seeded

SHAPE = (3, 16, 16)
EMBEDDING = "patch_embed.proj"


def small():
    with seeded():
        return randomize(VisionTransformer(ViTConfig(24, 2, 3, 4, 16, mlp_ratio=1.5), num_classes=5)).eval()


@pytest.fixture(scope="module")
def setting():
    model = small()
    return model, Widths(model, SHAPE)


def test_there_are_five_kinds_of_widths(setting):
    _, widths = setting
    block = {"attn.qkv": 3, "attn.queries": 8, "attn.values": 8, "mlp.fc1": 36}
    wanted = {f"blocks.{i}.{name}": size for i in range(2) for name, size in block.items()}
    assert widths.sizes == {EMBEDDING: 24, **wanted}


def masked_norm(norm, keep):
    """Return a layer norm over the features that are kept, zero elsewhere."""

    def forward(x):
        y = torch.zeros_like(x)
        y[..., keep] = F.layer_norm(
            x[..., keep], (int(keep.sum()),), norm.weight[keep], norm.bias[keep], norm.eps
        )
        return y

    return forward


@pytest.mark.parametrize("kind", ["embedding", "heads", "queries", "values", "hidden"])
def test_removed_equals_masked(kind, setting):
    model, widths = setting
    with seeded():
        x = torch.randn(2, *SHAPE)
        draw = lambda size: (torch.rand(size) < 0.6).index_fill(0, torch.tensor([0]), True)  # noqa: E731
        name = {"embedding": EMBEDDING, "heads": "attn.qkv", "hidden": "mlp.fc1"}.get(kind, f"attn.{kind}")
        keep = {n: draw(size) for n, size in widths.sizes.items() if n.endswith(name)}
    dense = small()
    with torch.no_grad():
        for n, mask in keep.items():
            layer = dense.get_submodule(n.removesuffix(f".{kind}"))
            if kind == "embedding":
                dense = widths.structure.mask(model, keep)
                for module in dense.modules():
                    if isinstance(module, nn.LayerNorm):
                        module.forward = masked_norm(module, mask)
            elif kind == "hidden":
                layer.weight[~mask], layer.bias[~mask] = 0, 0
            elif kind == "heads":
                layer.bias.view(3, 3, 8)[:, ~mask] = 0
                layer.weight.view(3, 3, 8, 24)[:, ~mask] = 0
            else:
                parts = slice(2) if kind == "queries" else slice(2, 3)
                layer.qkv.bias.view(3, 3, 8)[parts, :, ~mask] = 0
                layer.qkv.weight.view(3, 3, 8, 24)[parts, :, ~mask] = 0
        smaller = widths.remove(model, keep)
        torch.testing.assert_close(smaller(x), dense(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


def test_scores_are_squared_derivatives_of_the_loss(setting):
    """Scaling all that a unit owns by 1 + t changes the loss at the rate that is squared."""
    model, widths = setting
    with seeded():
        x, y = torch.randn(4, *SHAPE), torch.tensor([0, 1, 2, 3])
    loss = lambda m: F.cross_entropy(m(x), y)  # noqa: E731
    scores = saliency(model, widths, [loss, loss])
    step = 1e-2
    for name, rows in (("blocks.0.attn.values", 8), ("blocks.1.mlp.fc1", 36)):
        unit, changed = 5, []
        for sign in (1, -1):
            twin = small()
            with torch.no_grad():
                if rows == 8:
                    attention = twin.blocks[0].attn
                    attention.qkv.weight.view(3, 3, 8, 24)[2, :, unit] *= 1 + sign * step
                    attention.qkv.bias.view(3, 3, 8)[2, :, unit] *= 1 + sign * step
                    attention.proj.weight.view(24, 3, 8)[:, :, unit] *= 1 + sign * step
                else:
                    mlp = twin.blocks[1].mlp
                    mlp.fc1.weight[unit] *= 1 + sign * step
                    mlp.fc1.bias[unit] *= 1 + sign * step
                    mlp.fc2.weight[:, unit] *= 1 + sign * step
                changed.append(float(loss(twin)))
        rate = (changed[0] - changed[1]) / (2 * step)
        assert float(scores[name][unit]) == pytest.approx(rate**2, rel=0.02, abs=1e-7)


def test_latency_is_reached_with_the_least_important(setting):
    model, _ = setting
    with seeded():
        x, y = torch.randn(4, *SHAPE), torch.tensor([0, 1, 2, 3])
        trained = []
        # Time grows with heads and hidden units only.
        latency = lambda m: sum(10 * b.attn.num_heads + b.mlp.fc1.out_features for b in m.blocks)  # noqa: E731
        smaller, report = nvit(
            model,
            [lambda m: F.cross_entropy(m(x), y)],
            SHAPE,
            0.5,
            latency=latency,
            rounds=2,
            multiple=4,
            finetune=trained.append,
        )
    assert 0.4 * latency(model) < latency(smaller) <= 0.5 * latency(model)
    assert smaller.patch_embed.proj.out_channels == 24
    assert all(block.mlp.fc1.out_features % 4 == 0 for block in smaller.blocks)
    assert len(trained) == 2
    assert "of before" in report.notes[0]


def test_what_cannot_be_is_refused(setting):
    model, _ = setting
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\): got 1"):
        nvit(model, [lambda m: m(torch.zeros(1, *SHAPE)).sum()], SHAPE, 1)
    with pytest.raises(ValueError, match="losses must hold"):
        nvit(model, [], SHAPE)


def test_features_of_a_single_head_go_once():
    """A layer with one head, pruned and pruned again: its queries and values are found once."""
    with seeded():
        config = ViTConfig(24, 1, 1, 4, 16, mlp_ratio=1.5)
        model = randomize(VisionTransformer(config, num_classes=5)).eval()
    for step in (3, 2):
        widths = Widths(model, SHAPE)
        leaves = sorted(name.rpartition(".")[2] for name in widths.sizes)
        assert leaves == ["fc1", "proj", "queries", "values"]
        model = widths.remove(model, {name: torch.arange(n) % step > 0 for name, n in widths.sizes.items()})
    assert Widths(model, SHAPE).sizes == {
        EMBEDDING: 8, "blocks.0.attn.queries": 8, "blocks.0.attn.values": 8, "blocks.0.mlp.fc1": 12,
    }  # fmt: skip
    assert model(torch.randn(2, *SHAPE)).shape == (2, 5)
