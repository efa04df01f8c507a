import torch
from torch.nn import functional as F

from omniconv.layers.sequence.hyena_nd import HyenaNd
from omniconv.layers.sequence.multi_hyena import MultiHyena


def test_it_is_the_sum_of_its_equation():
    torch.manual_seed(0)
    layer = MultiHyena(6, 2, width=5, dtype=torch.float64)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    query, key, value = layer.short(F.pad(layer.project(x), (2, 0))).chunk(3, 1)
    filters = layer.filter((8,)).clone()
    filters[:, 0] += layer.skip
    z = torch.zeros_like(x)
    for m in range(2):
        part = slice(3 * m, 3 * m + 3)
        q, k, v = query[:, part], key[:, part], value[:, part]
        for t in range(8):
            memory = sum(filters[m, t - u] * v[..., u, None] * k[:, None, :, u] for u in range(t + 1))
            z[:, part, t] = (memory @ q[..., t, None])[..., 0]
    assert (layer(x) - layer.mix(z)).abs().max() < 1e-12


def test_a_head_for_every_channel_is_hyena_of_order_2():
    torch.manual_seed(0)
    heads, hyena = MultiHyena(4, 4, width=5), HyenaNd(4, 1, directions="causal", width=5)
    heads.load_state_dict({name: t[0] if name == "skip" else t for name, t in hyena.state_dict().items()})
    x = torch.randn(2, 4, 9)
    assert (heads(x) - hyena(x)).abs().max() < 1e-5
