"""Calls of depthwise convolution that its contract runs over."""

from omniconv.core.cases import OpCase, Raises
from omniconv.ops.depthwise_conv.api import depthwise_conv

__all__: list[str] = []


def _case(
    id: str, x: tuple[int, ...], kernel: tuple[int, ...], bias: bool = True, multiplier: int = 1, **more
) -> OpCase:
    raises = more.pop("raises", ())
    out = x[1] * multiplier
    inputs = {"x": x, "weight": (out, 1, *kernel)} | ({"bias": (out,)} if bias else {})
    return OpCase(depthwise_conv, inputs, more, id, raises)


CASES = (
    _case(
        "2d",
        (2, 3, 7, 5),
        (3, 3),
        padding=1,
        raises=(
            Raises(
                ValueError,
                "depthwise_conv has no impl 'chanels_last'; did you mean channels_last? "
                "(of auto, torch, channels_last, direct, fft, triton)",
                {"impl": "chanels_last"},
            ),
            Raises(
                ValueError,
                "x must be (N, C, *S) and weight (m C, 1, *K) with the same one to three axes: "
                "got (3, 7, 5) and (3, 1, 3, 3)",
                inputs=((3, 7, 5), (3, 1, 3, 3), (3,)),
            ),
            Raises(
                ValueError,
                "weight must have one input channel and a multiple of x's 3 channels: got (4, 1, 3, 3)",
                inputs=((2, 3, 7, 5), (4, 1, 3, 3), (4,)),
            ),
            Raises(
                ValueError,
                "bias must be (3,), one number a kernel: got (4,)",
                inputs=((2, 3, 7, 5), (3, 1, 3, 3), (4,)),
            ),
            Raises(ValueError, "stride must be one or 2 integers of at least 1: got 0", {"stride": 0}),
            Raises(
                ValueError, "dilation must be one or 2 integers of at least 1: got (1,)", {"dilation": (1,)}
            ),
            Raises(
                ValueError, "padding must be 'same', 'valid' or integers: got 'full'", {"padding": "full"}
            ),
            Raises(ValueError, "padding 'same' needs stride 1: got 2", {"padding": "same", "stride": 2}),
            Raises(
                ValueError,
                "impl 'channels_last' of depthwise_conv cannot take this call: "
                "it is for stride 1, not (2, 2); use impl='auto'",
                {"impl": "channels_last", "stride": 2},
            ),
        ),
    ),
    _case("2d-large", (2, 4, 9, 6), (13, 13), padding="same"),
    _case("2d-oblong", (3, 2, 8, 9), (3, 7), bias=False, padding="same"),
    _case("2d-1x1", (2, 3, 4, 5), (1, 1)),
    _case("2d-one-plane", (1, 1, 5, 4), (5, 5), padding=2),
    _case("2d-even", (2, 3, 7, 5), (4, 2), padding="same"),
    _case("2d-valid", (2, 3, 9, 7), (5, 3), padding="valid"),
    _case("2d-strided", (2, 3, 9, 8), (5, 3), stride=(2, 3), padding=(1, 2), dilation=(1, 2)),
    _case("2d-multiplier", (2, 3, 6, 7), (3, 3), multiplier=2, padding=1),
    _case("1d", (2, 3, 11), (5,), padding="same", dilation=2),
    _case("1d-strided", (2, 3, 11), (4,), stride=3, padding=1, bias=False),
    _case("3d", (2, 2, 4, 5, 3), (3, 3, 1), padding=(1, 1, 0), stride=(1, 2, 1)),
)
