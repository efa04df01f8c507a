"""Convolutions give a vision transformer its order: without any table of positions it follows shifts of the image,
takes images of every size, and tells one order of patches from another; strided keys cost a quarter.

The networks have random weights and the published sizes. Where keys have a stride of 2, shifts of the image by 32
pixels move the last stage's keys by whole steps; shifts by 16 do where keys have no stride.
"""

import torch
from torch import Tensor, nn

from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model, get_variant
from omniconv.models.image.cvt import ConvAttention
from omniconv.papers.check import Check

COUNTS = {
    "cvt_13": (19.997e6, 4.5e9),
    "cvt_21": (31.623e6, 7.1e9),
    "cvt_w24_384": (277.196e6, 193.2e9),
}
PARAMETERS_ERROR = 0.005
MACS_ERROR = 0.03
SHIFT_ERROR = 1e-4
PLAIN_ERROR = 1e-6
SCORES = 4.0
ORDER = 1e-3
SIZES = (224, 288, 384)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def shift_error(shift: int, kv_stride: int) -> float:
    """Return how far the last map is from following a shift of the image, with borders that wrap around."""
    torch.manual_seed(0)
    model = create_model("cvt_13", num_classes=0, class_token=False, kv_stride=kv_stride).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [int(module.padding[0])] * 4
    x = torch.randn(1, 3, 128, 192)
    maps = [model.forward_stages(image)[-1] for image in (x, x.roll((shift, shift), (2, 3)))]
    return error(maps[1], maps[0].roll((shift // 16, shift // 16), (2, 3)))


def scores(kv_stride: int) -> int:
    """Return how many pairs of query and key the attention of a whole CvT-13 compares, on 128 pixels."""
    model = create_model("cvt_13", class_token=False, kv_stride=kv_stride, device="meta").eval()
    pairs: list[int] = []

    def count(module: ConvAttention, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        _, height, width = inputs
        fmap = torch.empty(1, output.shape[2], height, width, device="meta")
        pairs.append(output.shape[1] * module.conv_proj_k(fmap)[0, 0].numel())

    for module in model.modules():
        if isinstance(module, ConvAttention):
            module.register_forward_hook(count)
    model(torch.empty(1, 3, 128, 128, device="meta"))
    return sum(pairs)


def attention(*, plain: bool) -> ConvAttention:
    """Return an attention without stride, whose depthwise kernels are deltas if `plain`."""
    torch.manual_seed(0)
    layer = ConvAttention(24, 3, kv_stride=1).eval()
    for conv in (layer.conv_proj_q, layer.conv_proj_k, layer.conv_proj_v):
        norm = conv.get_submodule("bn")
        assert isinstance(norm, nn.BatchNorm2d)
        norm.eps = 0.0
        if plain:
            nn.init.dirac_(conv.get_submodule("conv").get_parameter("weight"), groups=24)
    return layer


def run(check: Check) -> None:
    """Count the networks; measure shifts, sizes, plain attention and the worth of order."""
    for name, (parameters, macs) in COUNTS.items():
        size = get_variant(name).size
        cost = count_cost(create_model(name, device="meta"), (3, size, size))
        check.require(
            f"relative error of {name}'s parameters", abs(cost.parameters / parameters - 1), "<=", PARAMETERS_ERROR
        )  # fmt: skip
        check.require(
            f"relative error of {name}'s multiply-adds", abs(cost.macs / macs - 1), "<=", MACS_ERROR
        )  # fmt: skip

    with torch.no_grad():
        check.require("last map after a shift by 32 pixels", shift_error(32, 2), "<=", SHIFT_ERROR)
        check.require(
            "the same by 16 pixels, keys without a stride", shift_error(16, 1), "<=", SHIFT_ERROR,
            baseline=shift_error(16, 2),
        )  # fmt: skip

        torch.manual_seed(0)
        model = create_model("cvt_13").eval()
        answers = {size: model(torch.randn(1, 3, size, size)) for size in SIZES}
        finite = sum(bool(torch.isfinite(y).all()) and y.shape == (1, 1000) for y in answers.values())
        check.require(f"sizes among {SIZES} that one set of weights takes", finite, "==", len(SIZES))

        x = torch.randn(1, 3, 224, 224)
        swapped = x.clone()
        swapped[..., :32, :32], swapped[..., 96:128, 96:128] = x[..., 96:128, 96:128], x[..., :32, :32]
        check.require(
            "relative change of the logits when two patches change places", error(model(swapped), model(x)), ">", ORDER
        )  # fmt: skip

        tokens = torch.randn(2, 6 * 7, 24)
        plain, conv = attention(plain=True), attention(plain=False)
        fmap = tokens.transpose(1, 2).unflatten(2, (6, 7))
        check.require(
            "projection with delta kernels against the map", error(plain.conv_proj_k(fmap), fmap), "<=", PLAIN_ERROR
        )  # fmt: skip
        order = torch.randperm(42)
        check.require(
            "attention with delta kernels: permuted tokens give permuted outputs",
            error(plain(tokens[:, order], 6, 7), plain(tokens, 6, 7)[:, order]), "<=", PLAIN_ERROR * 10,
        )  # fmt: skip
        check.require(
            "the same with convolutions",
            error(conv(tokens[:, order], 6, 7), conv(tokens, 6, 7)[:, order]), ">", ORDER,
        )  # fmt: skip
    check.require("attention scores without over those with stride 2", scores(1) / scores(2), "==", SCORES)
