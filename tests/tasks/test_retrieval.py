"""Rankings and average precision against cases worked out by hand, with junk as the benchmark treats it."""

import numpy as np
import pytest

from omniconv.data.revisited import Query
from omniconv.tasks.retrieval import average_precision, rank_one, ranking, revisited_map


def test_the_nearest_direction_comes_first():
    order = ranking(np.array([[1.0, 0.1], [0, -2]]), np.array([[0.0, 5], [3, 0], [0.1, -0.1]]))
    assert order.tolist() == [[1, 2, 0], [2, 1, 0]]
    assert rank_one(order, np.array([7, 8]), np.array([8, 7, 9])) == 0.5


def test_average_precision_by_hand():
    order = np.array([4, 2, 0, 1, 3])
    # Found at places 0 and 3: trapezoids (1 + 1) / 2 and (1 / 3 + 2 / 4) / 2, each over half of the recall.
    assert average_precision(order, np.array([4, 1])) == pytest.approx((1 + (1 / 3 + 1 / 2) / 2) / 2)
    # Without the junk at place 1, the second one is found at place 2.
    wanted = (1 + (1 / 2 + 2 / 3) / 2) / 2
    assert average_precision(order, np.array([4, 1]), np.array([2])) == pytest.approx(wanted)
    assert average_precision(order, np.array([0, 1, 2, 3, 4])) == pytest.approx(1)
    assert np.isnan(average_precision(order, np.array([], int)))
    # Something that is never ranked counts as never found.
    assert average_precision(order[:2], np.array([4, 1])) == pytest.approx(0.5)


def test_protocols_say_what_is_sought_and_what_is_junk():
    order = np.array([[3, 0, 1, 2, 4]])
    query = (Query("q", (0, 0, 1, 1), easy=(0,), hard=(1, 4), junk=(3,)),)
    assert revisited_map(order, query, "easy") == pytest.approx(1)
    # 0 and 3 are taken out: 1, 2, 4.
    assert revisited_map(order, query, "hard") == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    # 3 is taken out: 0, 1, 2, 4.
    assert revisited_map(order, query, "medium") == pytest.approx((1 + 1 + (2 / 3 + 3 / 4) / 2) / 3)
    nothing = (*query, Query("r", (0, 0, 1, 1), easy=(), hard=(1,), junk=()))
    assert revisited_map(np.repeat(order, 2, 0), nothing, "easy") == pytest.approx(1)
