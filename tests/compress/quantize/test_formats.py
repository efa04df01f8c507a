import pytest
import torch

from omniconv.compress.quantize.bits import pack_bits, unpack_bits
from omniconv.compress.quantize.fliqs import BFLOAT16, E4M3, E5M2
from omniconv.compress.quantize.formats import Binary, Codebook, Float, Integer, PowerOfTwo, nearest


def brute(exponent, mantissa, reserved):
    values = set()
    for code in range(2 ** (exponent + mantissa) - reserved):
        e, m = code >> mantissa, code & (2**mantissa - 1)
        bias = 2 ** (exponent - 1) - 1
        value = 2.0 ** (1 - bias) * m / 2**mantissa if e == 0 else 2.0 ** (e - bias) * (1 + m / 2**mantissa)
        values |= {value, -value}
    return sorted(values)


@pytest.mark.parametrize("sizes", [(2, 1, 0), (3, 0, 0), (4, 3, 1), (5, 2, 4), (3, 2, 0), (1, 2, 0)])
def test_every_float_is_there(sizes):
    assert Float(*sizes).grid().tolist() == brute(*sizes)


def test_known_limits():
    assert Float(2, 1).grid().tolist()[7:] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (E4M3.grid()[-1], E5M2.grid()[-1]) == (448, 57344)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2), (BFLOAT16, torch.bfloat16)],
)
def test_rounding_is_that_of_the_hardware_types(form, dtype):
    torch.manual_seed(0)
    x = torch.randn(20000) * torch.logspace(-6, 2.2, 20000)
    grid = form.grid()
    ties = ((grid.double()[1:] + grid.double()[:-1]) / 2).float()
    x = torch.cat([x, ties[(ties.abs() < 400) & (ties.abs() > 1e-30)]])
    assert torch.equal(form.round(x, grid), x.to(dtype).float())


def test_whole_numbers():
    for bits in range(2, 10):
        signed, unsigned = Integer(bits).grid(), Integer(bits, signed=False).grid()
        assert len(signed) == len(unsigned) == 2**bits
        assert (signed[0], unsigned[0]) == (-(2 ** (bits - 1)), 0)
    form = Integer(4)
    x = torch.linspace(-12, 12, 193)
    assert torch.equal(form.round(x, form.grid()), nearest(x, form.grid()))
    with pytest.raises(ValueError, match="bits must lie between"):
        Integer(1)


def test_other_grids():
    assert PowerOfTwo(3).grid().tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    assert Binary().grid().tolist() == [-1, 1]
    assert torch.equal(nearest(torch.tensor([-0.1, 0.2, 9.0]), Binary().grid()), torch.tensor([-1.0, 1, 1]))


def test_k_means_is_as_good_as_scikit_learns():
    from sklearn.cluster import KMeans

    torch.manual_seed(0)
    x = torch.randn(500)
    grid = Codebook(3).fit(x, iterations=200)
    ours = float((nearest(x, grid) - x).square().sum())
    theirs = KMeans(8, n_init=2, random_state=0).fit(x[:, None].numpy()).inertia_
    assert ours <= 1.02 * theirs
    few = Codebook(3).fit(torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(nearest(torch.tensor([0.0, 1.0]), few), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("bits", [1, 3, 4, 8, 11])
def test_codes_are_packed_without_a_gap(bits):
    torch.manual_seed(bits)
    codes = torch.randint(2**bits, (7, 3, 5))
    packed = pack_bits(codes, bits)
    assert len(packed) == -(-codes.numel() * bits // 8)
    whole = sum(int(code) << (bits * i) for i, code in enumerate(codes.flatten()))
    assert int.from_bytes(bytes(packed.tolist()), "little") == whole
    assert torch.equal(unpack_bits(packed, bits, codes.shape), codes)
    with pytest.raises(ValueError, match="codes of"):
        unpack_bits(packed[:-1], bits, codes.shape)


def test_many_codes_are_packed_in_pieces():
    codes = torch.arange((1 << 20) + 3) % 8
    assert torch.equal(unpack_bits(pack_bits(codes, 3), 3, codes.shape), codes)
