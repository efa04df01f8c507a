"""Calls of deformable aggregation that its contract runs over."""

from omniconv.core.cases import OpCase, Raises
from omniconv.ops.deform.api import deform_aggregate

__all__: list[str] = []


def _case(
    id: str, x: tuple[int, ...], out: tuple[int, int], groups: int, taps: int, mask: bool = True, **more
):
    raises, longer = more.pop("raises", ()), more.pop("longer")

    def shapes(x: tuple[int, ...], out: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        both = {"x": x, "offset": (x[0], 2 * groups * taps, *out)}
        return both | ({"mask": (x[0], groups * taps, *out)} if mask else {})

    return OpCase(deform_aggregate, shapes(x, out), more, id, raises, longer=shapes(*longer))


CASES = (
    _case(
        "masked", (2, 4, 7, 5), (7, 5), 2, 9, padding=1, longer=((3, 4, 8, 7), (8, 7)),
        raises=(
            Raises(
                ValueError,
                "deform_aggregate has no impl 'compield'; did you mean compiled? (of auto, torch, compiled, triton)",
                {"impl": "compield"},
            ),
            Raises(ValueError, "stride must be one or two integers of at least 1: got 0", {"stride": 0}),
            Raises(
                ValueError,
                "x must be (N, C, H, W) and offset (N, 2 G K, H', W'): got (4, 7, 5) and (2, 36, 7, 5)",
                inputs=((4, 7, 5), (2, 36, 7, 5), (2, 18, 7, 5)),
            ),
            Raises(
                ValueError,
                "offset must have 2 x 9 channels for each group, and the groups must divide x's 5 channels: got 36",
                inputs=((2, 5, 7, 5), (2, 36, 7, 5), (2, 18, 7, 5)),
            ),
            Raises(ValueError, "offset must be of the output's size (5, 3): got (7, 5)", {"padding": 0}),
            Raises(
                ValueError,
                "mask must be (2, 18, 7, 5), one number a tap: got (2, 9, 7, 5)",
                inputs=((2, 4, 7, 5), (2, 36, 7, 5), (2, 9, 7, 5)),
            ),
        ),
    ),
    _case(
        "strided", (2, 6, 9, 8), (4, 3), 3, 6, kernel_size=(2, 3), stride=2, padding=(0, 1), dilation=(1, 2),
        offset_scale=0.5, longer=((3, 6, 11, 10), (5, 4)),
    ),
    _case("unmasked", (1, 3, 6, 7), (6, 7), 1, 9, False, padding=1, longer=((2, 3, 8, 9), (8, 9))),
    _case(
        "taps", (2, 4, 5, 6), (5, 6), 2, 9, padding=1, keep_taps=True, longer=((3, 4, 7, 8), (7, 8)),
    ),
    _case(
        "taps-unmasked", (2, 3, 6, 5), (3, 3), 1, 4, False, kernel_size=2, stride=2, padding=(0, 1), keep_taps=True,
        longer=((2, 3, 8, 7), (4, 4)),
    ),
)  # fmt: skip
