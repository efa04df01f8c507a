"""Split attention against the paper's cardinality-major loop."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.layers.conv.split_attention import SplitAttentionConv2d


def norm(x, layer, channels):
    return F.batch_norm(
        x,
        *(getattr(layer, name)[channels] for name in ("running_mean", "running_var", "weight", "bias")),
        eps=layer.eps,
    )


def cardinal_groups(layer, x):
    """The paper's figure: a loop over cardinal groups, each of which mixes its own splits."""
    k_groups, radix = layer.cardinality, layer.radix
    out = layer.fc1.in_channels
    share, inner, hidden = (
        out // k_groups,
        x.shape[1] // (k_groups * radix),
        layer.fc1.out_channels // k_groups,
    )
    outputs = []
    for k in range(k_groups):
        splits = []
        for r in range(radix):
            group = r * k_groups + k  # where the radix-major layout keeps it
            weight = layer.conv.weight[group * share : (group + 1) * share]
            u = F.conv2d(x[:, group * inner : (group + 1) * inner], weight, padding=1)
            splits.append(F.relu(norm(u, layer.bn0, slice(group * share, (group + 1) * share))))
        z = torch.stack(splits).sum(0).mean((2, 3), keepdim=True)
        part = slice(k * hidden, (k + 1) * hidden)
        h = F.relu(norm(F.conv2d(z, layer.fc1.weight[part], layer.fc1.bias[part]), layer.bn1, part))
        part = slice(k * radix * share, (k + 1) * radix * share)
        scores = F.conv2d(h, layer.fc2.weight[part], layer.fc2.bias[part]).unflatten(1, (radix, share))
        weights = scores.softmax(1) if radix > 1 else scores.sigmoid()
        outputs.append(sum(weights[:, r] * splits[r] for r in range(radix)))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(("groups", "radix"), [(1, 2), (2, 3), (4, 1)])
def test_radix_major_equals_the_loop_over_cardinal_groups(groups, radix):
    torch.manual_seed(0)
    layer = SplitAttentionConv2d(12, 6 * groups, groups=groups, radix=radix).double()
    layer(torch.randn(8, 12, 5, 5, dtype=torch.float64))
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), cardinal_groups(layer, x))


def test_attention_sums_to_one_over_the_splits():
    layer = SplitAttentionConv2d(8, 8, groups=2, radix=4)
    weights = layer.attention(torch.randn(3, 8, 1, 1))
    assert weights.shape == (3, 4, 8, 1, 1)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, 8, 1, 1))
