"""Transforms of vectors against numpy's and torch's, and how many operations they are."""

import math

import numpy as np
import pytest
import torch

from omniconv.ops import _fourier
from omniconv.ops._simd import lanes

LENGTHS = [*range(1, 65), 72, 81, 96, 100, 121, 125, 128, 144, 180, 192]


def carry_out(program, inputs):
    """Return the value of every step, computed as it was written down."""
    values = [0.0]
    for operation, a, b in program.steps:
        values.append(
            inputs[a] if operation == "in"
            else a * values[b] if operation == "mul"
            else values[a] + values[b] if operation == "add"
            else values[a] - values[b]
        )  # fmt: skip
    return values


def read(values, number):
    return math.copysign(1, number) * values[abs(number)]


@pytest.mark.parametrize("length", LENGTHS)
def test_what_is_written_down_is_the_transform_and_its_inverse(length):
    x = np.random.default_rng(length).normal(size=length)
    spectrum = {(k, of): (z.real, z.imag)[of] for k, z in enumerate(np.fft.rfft(x)) for of in (0, 1)}
    for make, inputs, wanted in (
        (_fourier.transform_program, dict(enumerate(x)), spectrum),
        (_fourier.inverse_program, spectrum, dict(enumerate(x))),
    ):
        program, outputs = make(length)
        values = carry_out(program, inputs)
        assert outputs.keys() == wanted.keys()
        for place, number in outputs.items():
            assert read(values, number) == pytest.approx(wanted[place], abs=1e-13 * length)


@pytest.mark.parametrize("length", [8, 16, 32, 64, 128])
def test_powers_of_two_cost_hardly_more_than_split_radix(length):
    # Sorensen et al., "Real-valued fast Fourier transform algorithms" (1987): N/2 (log2 N - 3) + 2 multiplications
    # and N/2 (3 log2 N - 5) + 4 additions.
    stages = int(math.log2(length))
    published = length // 2 * (stages - 3) + 2 + length // 2 * (3 * stages - 5) + 4
    program, outputs = _fourier.transform_program(length)
    steps = [program.steps[number - 1][0] for number in program.needed(list(outputs.values()))]
    assert published <= len(steps) - steps.count("in") <= 1.04 * published


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 12, 45, 96])
def test_compiled_transforms_equal_torchs(length, dtype):
    width, frequencies = lanes(dtype), length // 2 + 1
    x = torch.randn(length, width, dtype=dtype)
    # Frequencies need not lie side by side.
    spectrum = torch.full((frequencies, 3, width), float("nan"), dtype=dtype)
    step = 3 * 64
    transform, inverse = _fourier.transform(dtype, length), _fourier.inverse(dtype, length)
    transform.ctypes(x.data_ptr(), spectrum.data_ptr(), step)
    wanted = torch.fft.rfft(x.double(), dim=0)
    tolerance = 20 * torch.finfo(dtype).eps * length
    torch.testing.assert_close(spectrum[:, 0].double(), wanted.real, rtol=0, atol=tolerance)
    torch.testing.assert_close(spectrum[:, 1].double(), wanted.imag, rtol=0, atol=tolerance)
    assert spectrum[:, 2].isnan().all()
    back = torch.full_like(x, float("nan"))
    inverse.ctypes(back.data_ptr(), spectrum.data_ptr(), step)
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)


def test_lengths_are_of_small_factors():
    assert [_fourier.smooth_length(n) for n in (1, 7, 13, 29, 43, 71, 97, 190)] == [
        1,
        8,
        15,
        32,
        48,
        72,
        100,
        192,
    ]
