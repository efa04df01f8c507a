"""CvT against its official names, a plain attention and its own promises."""

import math

import pytest
import torch
from torch import nn

from omniconv.models.factory import create_model
from omniconv.models.image.cvt import ConvAttention, CvTConfig


def official_names() -> set[str]:
    """Return the names of the official CvT-13, put together from its classes."""
    names = {"norm.weight", "norm.bias", "head.weight", "head.bias", "stage2.cls_token"}
    pairs = ["norm1", "norm2", "mlp.fc1", "mlp.fc2", *(f"attn.proj{end}" for end in ("_q", "_k", "_v", ""))]
    for stage, depth in enumerate((1, 2, 10)):
        for layer in ("patch_embed.proj", "patch_embed.norm"):
            names |= {f"stage{stage}.{layer}.{end}" for end in ("weight", "bias")}
        for block in range(depth):
            prefix = f"stage{stage}.blocks.{block}"
            names |= {f"{prefix}.{pair}.{end}" for pair in pairs for end in ("weight", "bias")}
            for letter in "qkv":
                conv = f"{prefix}.attn.conv_proj_{letter}"
                norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
                names |= {f"{conv}.conv.weight"} | {f"{conv}.bn.{end}" for end in norm}
    return names


def test_names_are_the_official_ones():
    assert set(create_model("cvt_13", device="meta").state_dict()) == official_names()


@torch.no_grad()
def test_attention_is_plain_where_the_convolutions_do_nothing():
    torch.manual_seed(0)
    layer = ConvAttention(12, 3, kv_stride=1).double().eval()
    for conv in (layer.conv_proj_q, layer.conv_proj_k, layer.conv_proj_v):
        nn.init.dirac_(conv.get_submodule("conv").get_parameter("weight"), groups=12)
        conv.get_submodule("bn").eps = 0.0  # type: ignore[assignment]
    x = torch.randn(2, 1 + 4 * 5, 12, dtype=torch.float64)
    q, k, v = (linear(x).view(2, 21, 3, 4) for linear in (layer.proj_q, layer.proj_k, layer.proj_v))
    share = (torch.einsum("nigd,njgd->ngij", q, k) / math.sqrt(12)).softmax(-1)
    expected = layer.proj(torch.einsum("ngij,njgd->nigd", share, v).flatten(2))
    torch.testing.assert_close(layer(x, 4, 5), expected)


@pytest.mark.parametrize("class_token", [True, False])
@torch.no_grad()
def test_the_order_of_patches_counts(class_token):
    torch.manual_seed(0)
    model = create_model("cvt_test", num_classes=3, class_token=class_token).eval()
    x = torch.randn(1, 3, 64, 64)
    swapped = torch.cat([x[..., 32:], x[..., :32]], 3)
    assert (model(swapped) - model(x)).abs().max() > 1e-5


def test_fields_of_stages_are_equally_long():
    with pytest.raises(ValueError, match="must be equally long"):
        CvTConfig(depths=(1, 1))
    with pytest.raises(ValueError, match="num_heads must divide widths"):
        CvTConfig(num_heads=(1, 5, 6))
