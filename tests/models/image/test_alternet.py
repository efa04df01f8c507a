"""AlterNet against its build rule and its official names."""

import pytest

from omniconv.models.factory import create_model
from omniconv.models.image.alternet import OFFICIAL_NAMES, AlterNetConfig, AttentionBlock
from omniconv.models.weights import rename


def official_names() -> set[str]:
    """Return the names of the official AlterNet-18, put together from its classes."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"layer0.layer0.0.weight", "classifier.0.dense.weight", "classifier.0.dense.bias"}
    norms = ["classifier.0.bn"]
    for stage in range(1, 5):
        names |= {f"layer{stage}.{index}.conv1.weight" for index in range(2 if stage == 1 else 1)}
        names |= {f"layer{stage}.{index}.conv2.2.weight" for index in range(2 if stage == 1 else 1)}
        norms += [
            f"layer{stage}.{index}.{norm}"
            for index in range(2 if stage == 1 else 1)
            for norm in ("bn", "conv2.0")
        ]
        if stage == 1:
            continue
        block = f"layer{stage}.1"
        names |= {f"layer{stage}.0.shortcut.0.weight", f"{block}.conv.weight", f"{block}.attn.pos_embedding"}
        names |= {
            f"{block}.attn.attn.to_{end}" for end in ("q.weight", "kv.weight", "out.0.weight", "out.0.bias")
        }
        norms += [f"{block}.norm1", f"{block}.norm2"]
    return names | {f"{name}.{end}" for name in norms for end in norm}


def test_official_names_become_ours():
    model = create_model("alternet_18", device="meta")
    placeholder = model.get_classifier().get_parameter("weight")
    ours = rename(dict.fromkeys(official_names(), placeholder), OFFICIAL_NAMES)
    assert set(ours) == set(model.state_dict())


def test_attention_stands_at_the_end_of_every_stage():
    config = AlterNetConfig()
    assert [config.attends(stage) for stage in range(4)] == [
        [False] * 3,
        [False, False, False, True],
        [False, True] * 3,
        [False, True] * 2,
    ]
    model = create_model("alternet_50", device="meta")
    names = [name for name, module in model.named_modules() if isinstance(module, AttentionBlock)]
    assert names == ["layer2.3", "layer3.1", "layer3.3", "layer3.5", "layer4.1", "layer4.3"]
    heads = [model.get_submodule(f"{name}.attn").num_heads for name in names]
    assert heads == [6, 12, 12, 12, 24, 24]


def test_exact_parameters_of_the_official_networks():
    for name, count in (("alternet_18", 9_968_803), ("alternet_50", 35_915_038)):
        model = create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count


def test_more_attention_than_room_is_refused():
    with pytest.raises(ValueError, match="attention must be at most half of depths"):
        AlterNetConfig(depths=(1, 2, 2, 2), attention=(1, 1, 1, 1))
