"""Calls of convolution that its contract runs over."""

from omniconv.core.cases import OpCase, Raises
from omniconv.ops.conv.api import conv

__all__: list[str] = []


def _case(id: str, x: tuple[int, ...], weight: tuple[int, ...], bias: bool = True, **more) -> OpCase:
    raises = more.pop("raises", ())
    inputs = {"x": x, "weight": weight} | ({"bias": weight[:1]} if bias else {})
    return OpCase(conv, inputs, more, id, raises)


CASES = (
    _case(
        "2d",
        (2, 3, 7, 5),
        (4, 3, 3, 3),
        padding=1,
        raises=(
            Raises(
                ValueError,
                "conv has no impl 'im2wim'; did you mean im2win? (of auto, torch, im2col, im2win, sliding)",
                {"impl": "im2wim"},
            ),
            Raises(
                ValueError,
                "x must be (N, C, *S) and weight (O, C / groups, *K) with the same one or two axes: "
                "got (3, 7, 5) and (4, 3, 3, 3)",
                inputs=((3, 7, 5), (4, 3, 3, 3), (4,)),
            ),
            Raises(
                ValueError,
                "weight must be (O, C / groups, *K) with O a multiple of groups: "
                "got (4, 2, 3, 3), C 3 and groups 1",
                inputs=((2, 3, 7, 5), (4, 2, 3, 3), (4,)),
            ),
            Raises(
                ValueError,
                "bias must be (4,), one number a kernel: got (3,)",
                inputs=((2, 3, 7, 5), (4, 3, 3, 3), (3,)),
            ),
            Raises(ValueError, "padding must be one or 2 integers of at least 0: got -1", {"padding": -1}),
            Raises(ValueError, "stride must be one or 2 integers of at least 1: got (1,)", {"stride": (1,)}),
            Raises(
                ValueError,
                "the kernel must fit into the padded map: got kernel (3, 3), dilation (4, 4), map (7, 5) "
                "and padding (1, 1)",
                {"dilation": 4},
            ),
            Raises(
                ValueError,
                "impl 'sliding' of conv cannot take this call: a window that slides moves by one, not (2, 2); "
                "use impl='auto'",
                {"impl": "sliding", "stride": 2},
            ),
            Raises(
                ValueError,
                "impl 'im2win' of conv cannot take this call: it is for two axes, one group and dilation 1, "
                "not 2, 1 and (2, 2); use impl='auto'",
                {"impl": "im2win", "dilation": 2},
            ),
        ),
    ),
    _case("2d-large", (1, 2, 9, 14), (3, 2, 6, 13), bias=False, padding=(3, 6)),
    _case("2d-strided", (2, 3, 9, 8), (5, 3, 4, 3), stride=(2, 3), padding=(1, 2)),
    _case("2d-dilated", (2, 2, 9, 8), (3, 2, 3, 2), padding=(0, 4), dilation=(2, 3)),
    _case("2d-depthwise", (2, 3, 6, 7), (6, 1, 3, 5), padding=2, groups=3),
    _case("2d-groups", (2, 4, 6, 5), (6, 2, 3, 2), groups=2),
    _case("2d-1x1", (2, 3, 4, 5), (4, 3, 1, 1)),
    _case("1d", (2, 3, 11), (4, 3, 5), padding=2),
    _case("1d-dilated", (2, 4, 13), (4, 2, 4), bias=False, padding=3, dilation=2, groups=2),
)
