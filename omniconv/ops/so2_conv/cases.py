"""Calls of SO(2) convolution that its contract runs over."""

from omniconv.core.cases import OpCase, Raises
from omniconv.ops.so2_conv.api import so2_conv

__all__: list[str] = []


def _case(id: str, degree: int, order: int | None, weights: int, **more) -> OpCase:
    size = (degree + 1) ** 2
    return OpCase(
        so2_conv,
        {"x": (5, size, 3), "directions": (5, 3), "weight": (weights, 2, 3)},
        {} if order is None else {"order": order},
        id,
        longer={"x": (7, size, 3), "directions": (7, 3)},
        **more,
    )


CASES = (
    _case(
        "degree-2",
        2,
        None,
        19,
        raises=(
            Raises(
                ValueError,
                "x must be (E, (L + 1)^2, C): got (5, 8, 3)",
                inputs=((5, 8, 3), (5, 3), (19, 2, 3)),
            ),
            Raises(
                ValueError, "directions must be (E, 3): got (5, 2)", inputs=((5, 9, 3), (5, 2), (19, 2, 3))
            ),
            Raises(
                ValueError,
                "weight must be (19, C', 3) for degree 2 and order 2: got (18, 2, 3)",
                inputs=((5, 9, 3), (5, 3), (18, 2, 3)),
            ),
            Raises(ValueError, "order must lie between 0 and the degree 2: got 3", {"order": 3}),
        ),
    ),
    _case("order-1", 2, 1, 17),
)
