import pytest
from torch import nn

from omniconv.design.cost import count_cost
from omniconv.design.factorize import factorization_saving


@pytest.mark.parametrize(
    ("kernel", "parts", "saving"),
    [((5, 5), [(3, 3), (3, 3)], 0.28), ((3, 3), [(3, 1), (1, 3)], 1 / 3), ((7, 7), [(1, 7), (7, 1)], 5 / 7)],
)
def test_savings_are_the_papers_and_those_of_real_layers(kernel, parts, saving):
    assert factorization_saving(kernel, parts) == pytest.approx(saving)
    layers = [nn.Conv2d(6, 6, part, padding="same", bias=False) for part in [kernel, *parts]]
    whole, *pieces = [count_cost(layer, (6, 17, 13)) for layer in layers]
    assert 1 - sum(piece.macs for piece in pieces) / whole.macs == pytest.approx(saving)
    assert 1 - sum(piece.parameters for piece in pieces) / whole.parameters == pytest.approx(saving)


def test_a_stack_must_see_what_the_kernel_sees():
    with pytest.raises(ValueError, match=r"got \(5, 5\) pixels instead of \(7, 7\)"):
        factorization_saving((7, 7), [(3, 3), (3, 3)])
