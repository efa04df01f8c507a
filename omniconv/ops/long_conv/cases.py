"""Calls of long convolution that its contract runs over."""

from omniconv.core.cases import OpCase, Raises
from omniconv.ops.long_conv.api import long_conv

__all__: list[str] = []


def _case(id: str, x: tuple[int, ...], kernel: tuple[int, ...], *more: str, raises=(), **kwargs) -> OpCase:
    inputs = {"x": x, "kernel": (x[1], *kernel)}
    inputs |= {name: (x[1],) if name == "skip" else x for name in more}
    longer = tuple(size if axis == 1 else size + 2 for axis, size in enumerate(x))
    return OpCase(
        long_conv,
        inputs,
        kwargs,
        id,
        raises,
        longer={n: longer for n in inputs if n not in ("kernel", "skip")},
    )


CASES = (
    _case(
        "causal",
        (2, 3, 7),
        (7,),
        raises=(
            Raises(
                ValueError,
                "x must be (N, C, *S) and kernel (C, *K) with as many axes and channels: "
                "got (2, 3, 7) and (4, 7)",
                inputs=((2, 3, 7), (4, 7)),
            ),
            Raises(
                ValueError,
                "x must be (N, C, *S) and kernel (C, *K) with as many axes and channels: got (3, 7) and (3,)",
                inputs=((3, 7), (3,)),
            ),
            Raises(
                ValueError,
                "long_conv has no impl 'monarchy'; did you mean monarch? "
                "(of auto, torch, chunked, depthwise, monarch)",
                {"impl": "monarchy"},
            ),
        ),
    ),
    _case(
        "hyena",
        (3, 2, 9),
        (9,),
        "skip",
        "gate_in",
        "gate_out",
        raises=(
            Raises(
                ValueError,
                "skip must be (2,), one number a channel: got (3,)",
                inputs=((3, 2, 9), (2, 9), (3,), (3, 2, 9), (3, 2, 9)),
            ),
            Raises(
                ValueError,
                "gate_in must have the shape of x, (3, 2, 9): got (3, 2, 8)",
                inputs=((3, 2, 9), (2, 9), (2,), (3, 2, 8), (3, 2, 9)),
            ),
            Raises(
                ValueError,
                "gate_out must have the shape of x, (3, 2, 9): got (3, 1, 9)",
                inputs=((3, 2, 9), (2, 9), (2,), (3, 2, 9), (3, 1, 9)),
            ),
        ),
    ),
    _case("both", (2, 3, 6), (11,), "skip", bidirectional=True),
    _case("both-even", (2, 3, 11), (12,), bidirectional=True),
    _case("short", (3, 2, 13), (4,), "skip"),
    _case("one", (1, 1, 1), (1,)),
    _case("beyond", (2, 3, 5), (9,), "gate_out"),
    _case("both-beyond", (2, 3, 4), (12,), "gate_in", bidirectional=True),
    _case(
        "2d",
        (2, 3, 5, 7),
        (5, 7),
        "skip",
        raises=(
            Raises(
                ValueError,
                "impl 'monarch' of long_conv cannot take this call: it is for one axis, not 2; use impl='auto'",
                {"impl": "monarch"},
            ),
        ),
    ),
    _case("2d-both", (2, 3, 4, 5), (7, 9), "gate_in", bidirectional=True),
    _case("3d", (1, 2, 3, 5, 4), (3, 2, 4)),
)
