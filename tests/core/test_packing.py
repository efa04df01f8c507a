import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniconv.core.packing import pack, stored_bytes, unpack


def sparse(entries: int, density: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    kept = torch.rand(entries, generator=random) < density
    return torch.where(kept, torch.randn(entries, generator=random), torch.zeros(())).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def test_the_layout_is_the_documented_one():
    tensor = torch.zeros(40, 25)
    tensor.view(-1)[[0, 9, 15, 999]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    mask, values = pack(tensor)
    assert values.tolist() == [1, 2, 3, 4]
    expected = [0] * 125
    expected[0], expected[1], expected[124] = 1, 2 | 128, 128
    assert mask.tolist() == expected


@settings(deadline=None, max_examples=150)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    density=st.floats(0, 1),
    dtype=st.sampled_from(
        (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
            *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool),
            torch.complex64,
        )
    ),
    seed=st.integers(0, 2**20),
)
def test_nothing_is_lost_and_packing_never_grows(shape, density, dtype, seed):
    raw = np.random.default_rng(seed)
    size = torch.empty((), dtype=dtype).element_size()
    entries = math.prod(shape)
    # Any bit pattern at all, NaNs and negative zeros among them.
    octets = raw.integers(0, 2 if dtype is torch.bool else 256, (entries, size), dtype=np.uint8)
    octets[raw.random(entries) >= density] = 0
    tensor = torch.from_numpy(octets).reshape(-1).view(dtype).reshape(shape)
    plain = entries * size
    parts = pack(tensor)
    if parts is None:
        assert stored_bytes(tensor) == plain
    else:
        assert sum(part.numel() * part.element_size() for part in parts) < stored_bytes(tensor) < plain
        assert same_bits(unpack(*parts, tensor.shape), tensor)


def test_negative_zeros_survive():
    tensor = torch.zeros(2000)
    tensor[::100] = -0.0
    back = unpack(*pack(tensor), tensor.shape)
    assert torch.equal(back.signbit(), tensor.signbit())
    assert int(back.signbit().sum()) == 20


@pytest.mark.parametrize("tensor", [torch.tensor(0.0), torch.zeros(0), torch.zeros(3, 0, 2), torch.zeros(64)])
def test_what_is_small_stays_plain(tensor):
    assert pack(tensor) is None
    assert stored_bytes(tensor) == tensor.numel() * 4


def test_ninety_percent_zeros_take_a_seventh():
    tensor = torch.zeros(100_000)
    tensor[:10_000] = 1.0
    assert stored_bytes(tensor) < 400_000 / 7
    mask, values = pack(tensor)
    assert mask.numel() + 4 * values.numel() == 12_500 + 40_000


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda m, v: (m[:-1], v), (1001,)),
        (lambda m, v: (m, v[:-1]), (1001,)),
        (lambda m, v: (m.float(), v), (1001,)),
        (lambda m, v: (m.reshape(1, -1), v), (1001,)),
        (lambda m, v: (m, v), (2**40,)),
        # A bit beyond the last entry.
        (lambda m, v: (torch.cat([m[:-1], m[-1:] | 128]), torch.cat([v, v[:1]])), (1001,)),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change, shape):
    parts = pack(sparse(1001, 0.1))
    with pytest.raises(ValueError, match="mask"):
        unpack(*change(*parts), shape)
