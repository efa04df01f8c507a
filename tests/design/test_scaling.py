"""Scaling rules against the papers' tables."""

import pytest

from omniconv.design.scaling import best_base, cardinality_width, compound_scaling, scaling_bases


def test_compound_scaling_at_the_papers_steps():
    assert compound_scaling(0) == compound_scaling(0, alpha=9, beta=9, gamma=9)
    one = compound_scaling(1)
    assert (one.depth, one.width, one.resolution) == (1.2, 1.1, 256)
    # B2 and B3 of the paper: depth 1.2 and 1.4, width 1.1 and 1.2, 260 and 300 pixels.
    two = compound_scaling(2)
    assert (round(two.depth, 1), round(two.width, 1)) == (1.4, 1.2)
    assert abs(two.resolution - 300) <= 4
    assert compound_scaling(-50).resolution == 4


def test_compound_scaling_refuses_bases_that_shrink():
    with pytest.raises(ValueError, match="at least 1"):
        compound_scaling(1, beta=0.9)


def test_grid_holds_the_papers_bases_and_meets_the_cost():
    bases = list(scaling_bases())
    assert (1.2, 1.1, 1.15) in bases
    assert len(set(bases)) == len(bases)
    assert all(1.8 - 1e-9 <= a * b * b * g * g <= 2.2 + 1e-9 for a, b, g in bases)
    # Every axis alone is on the grid too: depth doubled, or width or resolution times the root of two.
    assert (2.0, 1.0, 1.0) in bases
    assert (1.0, 1.4, 1.0) in bases
    assert (1.0, 1.0, 1.4) in bases


def test_best_base_finds_the_best_score():
    target = (1.2, 1.1, 1.15)

    def score(scale):
        return -abs(scale.depth - 1.2) - abs(scale.width - 1.1) - abs(scale.resolution / 1000 - 1.15)

    assert best_base(score, resolution=1000) == target
    with pytest.raises(ValueError, match="smaller step"):
        best_base(score, step=0.5, tolerance=0.01, factor=1.2)


@pytest.mark.parametrize(("cardinality", "width"), [(1, 64), (2, 40), (4, 24), (8, 14), (32, 4)])
def test_cardinality_width_is_resnexts_table_2(cardinality, width):
    assert cardinality_width(cardinality) == width
