import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from omniconv.compress.factor.hankel import (
    balanced_truncation,
    distillation_order,
    fit_residues,
    hankel_singular_values,
    modal_truncation,
)
from omniconv.compress.factor.laughing_hyena import RecurrentHyena, distill, distill_filters
from omniconv.compress.factor.recurrence import Recurrence, block_powers
from omniconv.layers.sequence.block import GatedBlock
from omniconv.layers.sequence.hyena_nd import HyenaNd
from omniconv.layers.sequence.long_conv import LongConv
from omniconv.layers.sequence.multi_hyena import MultiHyena
from omniconv.layers.sequence.multires import MultiresConv
from omniconv.layers.sequence.sgconv import SGConv


def exponentials(channels: int, pairs: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Filters that are sums of decaying oscillations, from the formula, and their poles of the upper half plane."""
    torch.manual_seed(0)
    poles = torch.polar(
        0.6 + 0.35 * torch.rand(channels, pairs, dtype=torch.float64),
        0.2 + 2.7 * torch.rand(channels, pairs, dtype=torch.float64),
    )
    weights = torch.randn(channels, pairs, dtype=torch.complex128)
    taps = (weights[..., None] * poles[..., None] ** torch.arange(length - 1)).sum(1).real
    return torch.cat([torch.randn(channels, 1, dtype=torch.float64), taps], 1), poles


def test_powers_of_blocks_are_matrix_powers():
    for a, q in ((0.5, -0.3), (0.2, 0.4), (-0.9, 0.0)):
        powers = block_powers(torch.tensor(a, dtype=torch.float64), torch.tensor(q, dtype=torch.float64), 11)
        for t in range(11):
            matrix = np.linalg.matrix_power(np.array([[a, q], [1, a]]), t)
            np.testing.assert_allclose(powers[:, t], matrix[:, 0], atol=1e-12)


def test_singular_values_are_those_of_the_hankel_matrix():
    kernel = torch.randn(3, 15, dtype=torch.float64)
    for taps, values in zip(kernel, hankel_singular_values(kernel), strict=True):
        matrix = scipy.linalg.hankel(taps[1:8], taps[7:14])
        np.testing.assert_allclose(values, scipy.linalg.svdvals(matrix), atol=1e-12)


def test_steps_prefill_and_convolution_agree():
    kernel, _ = exponentials(3, 3, 40)
    filters = balanced_truncation(kernel, 6)
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    slow = torch.stack([sum(kernel[:, u] * x[..., t - u] for u in range(t + 1)) for t in range(40)], -1)
    assert (filters(x) - slow).abs().max() < 1e-9
    state, ys = filters.initial_state(2), []
    for t in range(40):
        y, state = filters.step(x[..., t], state)
        ys.append(y)
    assert (torch.stack(ys, -1) - slow).abs().max() < 1e-9
    y, at_end = filters.prefill(x)
    assert (y - slow).abs().max() < 1e-9
    assert (at_end - state).abs().max() < 1e-9


def test_poles_and_order_of_a_sum_of_exponentials_are_found():
    kernel, poles = exponentials(4, 3, 64)
    assert distillation_order(kernel, 1e-9) == 6
    found = balanced_truncation(kernel, 6).poles()
    for wanted, got in zip(poles, found, strict=True):
        assert all((got - p).abs().min() < 1e-6 for p in torch.cat([wanted, wanted.conj()]))
    # Two real poles share a block.
    steps = torch.arange(30, dtype=torch.float64)
    kernel = torch.cat([torch.zeros(1), 0.9**steps - 2 * 0.3**steps])[None]
    assert balanced_truncation(kernel, 2).poles().real.sort().values.tolist() == [
        pytest.approx([0.3, 0.9], abs=1e-8)
    ]


def test_the_fit_never_loses_to_its_start_and_stays_stable():
    torch.manual_seed(1)
    kernel = torch.randn(3, 50, dtype=torch.float64)
    start, fitted = balanced_truncation(kernel, 8), distill_filters(kernel, 8, steps=20)
    errors = [(f.kernel(50) - kernel).norm(dim=1) for f in (start, fitted)]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert errors[1].sum() < 0.99 * errors[0].sum()
    assert fitted.poles().abs().max() < 1
    # Adamyan, Arov and Krein.
    difference = hankel_singular_values(fitted.kernel(50) - kernel)[:, 0]
    assert (difference >= hankel_singular_values(kernel)[:, 8] * (1 - 1e-9)).all()


def test_residues_are_least_squares():
    torch.manual_seed(0)
    center, spread = torch.tensor([[[0.5, -0.2]], [[-0.2, 0.1]]], dtype=torch.float64)
    kernel = torch.randn(1, 20, dtype=torch.float64)
    basis = block_powers(center, spread, 19)[:, 0].permute(2, 1, 0).reshape(19, 4)
    wanted = np.linalg.lstsq(basis.numpy(), kernel[0, 1:].numpy(), rcond=None)[0]
    np.testing.assert_allclose(fit_residues(center, spread, kernel).flatten(), wanted, atol=1e-10)


def test_modal_truncation_keeps_the_loudest_block():
    center, spread = torch.tensor([[0.5, 0.9, 0.1]]), torch.tensor([[-0.1, -0.01, 0.0]])
    residues = torch.tensor([[[1.0, 0.0], [5.0, 0.0], [0.1, 0.0]]])
    kept = modal_truncation(Recurrence(center, spread, residues, torch.ones(1)), 2, 50)
    assert kept.center.tolist() == [[pytest.approx(0.9)]]
    assert kept.residues.tolist() == [[[5.0, 0.0]]]
    with pytest.raises(ValueError, match="order must be even and from 2 to 2: got 4"):
        modal_truncation(kept, 4, 50)


@pytest.mark.parametrize(
    "layer",
    [
        HyenaNd(4, 1, order=3, directions="causal", width=6, frequency=1.0),
        MultiHyena(4, 2, width=6, frequency=1.0),
    ],
    ids=["hyena", "multi"],
)
def test_a_distilled_hyena_steps_as_it_convolves(layer):
    x = torch.randn(2, 4, 24)
    model, report = distill(nn.Sequential(layer), x, 10, steps=60)
    recurrent = model[0]
    assert isinstance(recurrent, RecurrentHyena)
    assert "0: 24 taps in 10 states" in report.notes[0]
    wanted = layer(x)
    assert (recurrent(x) - wanted).norm() < 0.05 * wanted.norm()
    y, state = recurrent.prefill(x[..., :9])
    ys = list(y.unbind(2))
    for t in range(9, 24):
        y, state = recurrent.step(x[..., t], state)
        ys.append(y)
    assert (torch.stack(ys, 2) - recurrent(x)).abs().max() < 1e-4
    assert (recurrent.step(x[..., 0])[0] - recurrent(x)[..., 0]).abs().max() < 1e-4


def test_other_long_convolutions_are_distilled_with_their_skips():
    kernel, _ = exponentials(3, 2, 21)
    layer = LongConv(3, 21, squash=0.0)
    with torch.no_grad():
        layer.kernel.copy_(kernel)
    model = nn.Sequential(
        GatedBlock(lambda **_: layer, 3),
        SGConv(3, 21, 4),
        MultiresConv(3, length=4),
        LongConv(3, 21, bidirectional=True),
    ).eval()
    x = torch.randn(2, 3, 21)
    result, report = distill(model, x, 8, steps=0)
    kinds = [type(m) for m in (result[0].inner, result[1], result[2], result[3])]
    assert kinds == [Recurrence, Recurrence, Recurrence, LongConv]
    assert report.notes[-1] == "3 sees the future or has several axes; it stays a convolution."
    assert (result[0](x) - model[0](x)).abs().max() < 1e-4
    # A short filter has all its poles at zero, which blocks of distinct poles only come close to.
    assert (result[2](x) - model[2](x)).abs().max() < 1e-2


def test_orders_that_cannot_be():
    for order in (3, 0, 10):
        with pytest.raises(ValueError, match=f"order must be even and from 2 to 9 for 21 taps: got {order}"):
            distill_filters(torch.randn(1, 21), order)
