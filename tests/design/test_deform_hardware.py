"""The accelerator's cost model against a simulation that counts, and against sums worked out by hand."""

import numpy as np
import pytest
import torch

from omniconv.design.deform_hardware import deform_cost, simulate_line_buffer
from omniconv.ops.deform.api import deform_aggregate


def draw(bound=None, rounded=False, kernel=3):
    random = np.random.default_rng(0)
    x, offset = random.normal(size=(2, 13, 9)), 5 * random.normal(size=(2 * kernel**2, 13, 9))
    offset = offset if bound is None else offset.clip(-bound, bound)
    return x, offset.round() if rounded else offset


@pytest.mark.parametrize(("bound", "rounded", "kernel"), [(None, False, 3), (2.0, True, 3), (1.5, False, 5)])
def test_the_simulation_samples_as_the_operator_does_and_reads_what_the_model_says(bound, rounded, kernel):
    x, offset = draw(bound, rounded, kernel)
    trace = simulate_line_buffer(x, offset, kernel, bound=bound, rounded=rounded)
    maps = (torch.from_numpy(t)[None] for t in (x, offset))
    wanted = deform_aggregate(*maps, kernel_size=kernel, padding=kernel // 2, keep_taps=True)[0]
    np.testing.assert_allclose(trace.samples, wanted.numpy(), atol=1e-12)
    cost = deform_cost(2, 2, 13, 9, kernel, bound=bound, rounded=rounded)
    for count in ("random_reads", "sequential_reads", "buffer_reads"):
        assert getattr(trace, count) == getattr(cost, count), count


def test_an_offset_beyond_the_bound_finds_its_row_missing():
    x, offset = draw()
    with pytest.raises(ValueError, match=r"row \d+ is not in the line buffer; bound the offsets"):
        simulate_line_buffer(x, offset, bound=1.0)


def test_costs_worked_out_by_hand():
    free = deform_cost(8, 16, 5, 4)
    assert (free.macs, free.interpolation_macs) == (20 * 9 * 8 * 16, 20 * 9 * 4 * 8)
    assert (free.random_reads, free.random_bytes) == (20 * 36, 20 * 36 * 8)
    assert free.sequential_bytes == 20 * (18 + 16)
    small = deform_cost(8, 16, 5, 4, depthwise=True, square=True, bound=8, rounded=True, bits=4)
    assert (small.macs, small.interpolation_macs) == (20 * (8 * 16 + 9 * 16), 0)
    assert (small.random_reads, small.sequential_reads, small.buffer_reads) == (0, 20, 180)
    assert small.buffer_rows == 2 * (8 + 1) + 1
    assert small.sequential_bytes == 20 * (1 + 16 + 16) // 2


def test_latency_moves_first_and_computes_then():
    cost = deform_cost(8, 8, 4, 4)
    wanted = (cost.sequential_bytes + 3 * cost.random_bytes) / 1e9 + (
        cost.macs + cost.interpolation_macs
    ) / 1e10
    assert cost.latency(bandwidth=1e9, macs=1e10, random_penalty=3) == pytest.approx(wanted)
