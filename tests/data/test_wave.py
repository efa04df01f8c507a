import math

import pytest
import torch

from omniconv.data.wave import wave_2d, wave_energy, wave_runs, wave_step_limit


def test_a_standing_wave_of_the_grid_is_exact():
    # Modes of the difference operator swing at the frequency sin(w dt / 2) = c dt / h sqrt(sum of sin^2(k h / 2)).
    size, dt = 9, 0.05
    h = 1 / (size + 1)
    x = torch.arange(1, size + 1, dtype=torch.float64) * h
    mode = torch.sin(2 * math.pi * x)[:, None] * torch.sin(math.pi * x)
    reach = dt / h * math.hypot(math.sin(math.pi * h), math.sin(math.pi * h / 2))
    fields = wave_2d(mode[None], 40, dt)[0]
    for n in (1, 7, 40):
        assert (fields[n] - mode * math.cos(2 * n * math.asin(reach))).abs().max() < 1e-12


@pytest.mark.parametrize("boundary", ["fixed", "free"])
def test_energy_stays_with_any_speed(boundary):
    torch.manual_seed(0)
    speed = 0.5 + torch.rand(10, 10, dtype=torch.float64)
    dt = 0.9 * wave_step_limit(10, float(speed.max()), boundary)
    fields = wave_2d(torch.randn(2, 10, 10, dtype=torch.float64), 200, dt, speed=speed, boundary=boundary)
    energies = torch.stack(
        [wave_energy(fields[:, n], fields[:, n + 1], dt, speed=speed, boundary=boundary) for n in range(200)]
    )
    assert (energies / energies[0] - 1).abs().max() < 1e-10


def test_edges_reflect_turned_over_or_upright():
    pulse = torch.zeros(1, 41, 41, dtype=torch.float64)
    pulse[:] = torch.exp(-((torch.arange(41) - 10.0) ** 2) / 18)
    # Half of the pulse runs to the edge at 0 and back; after 0.5 it is where the other half was after 0.
    for boundary, sign in (("fixed", -1), ("free", 1)):
        dt = 0.7 * wave_step_limit(41, boundary=boundary)
        middle = wave_2d(pulse, round(0.5 / dt), dt, boundary=boundary)[0, -1, 20]
        first = middle[5:14]
        assert sign * first[first.abs().argmax()] > 0.4


def test_runs_are_the_solver_from_their_initial_fields():
    initial, fields = wave_runs(3, 16, frames=2, time=0.1, seed=1)
    assert initial.shape == (3, 1, 16, 16)
    assert fields.shape == (3, 2, 16, 16)
    steps = 2 * math.ceil(0.05 / (0.7 * wave_step_limit(16)))
    assert torch.allclose(wave_2d(initial[:, 0], steps, 0.1 / steps)[:, -1], fields[:, -1], atol=1e-5)
    assert torch.equal(wave_runs(3, 16, frames=2, time=0.1, seed=1)[1], fields)
    assert not torch.equal(wave_runs(3, 16, frames=2, time=0.1, seed=2)[1], fields)


def test_what_cannot_be_solved():
    with pytest.raises(
        ValueError, match=r"dt must be positive and at most 0\.06428 for 10 points a side: got 0\.07"
    ):
        wave_2d(torch.zeros(1, 10, 10), 3, 0.07)
    with pytest.raises(ValueError, match=r"initial must be \(N, S, S\): got \(1, 10, 9\)"):
        wave_2d(torch.zeros(1, 10, 9), 3, 0.01)
