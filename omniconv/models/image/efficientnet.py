"""EfficientNet: one searched network, made larger in depth, width and resolution at once.

Paper: Tan and Le, https://arxiv.org/abs/1905.11946. B1 to B8 are B0 under two multipliers and with larger
images; the rule that chooses them is `omniconv.design.scaling.compound_scaling`. The Lite networks leave the
gates out and use ReLU6. The cc networks have experts in their last three stages (Yang et al., CondConv,
https://arxiv.org/abs/1904.04971). `tf_` variants take TensorFlow's padding and norm, as weights trained there need.
"""

from dataclasses import dataclass, replace
from typing import Literal

from omniconv.models.backbone import Variant
from omniconv.models.image.mobilenetv2 import MobileNetV2, MobileNetV2Config, Stage

__all__ = ["EfficientNet", "EfficientNetConfig"]


@dataclass(frozen=True)
class EfficientNetConfig(MobileNetV2Config):
    """What tells one EfficientNet from another: the fields of `MobileNetV2Config`, with the values of B0."""

    stages: tuple[Stage, ...] = (
        Stage(1, 16, 1, 1, 3),
        Stage(6, 24, 2, 2, 3),
        Stage(6, 40, 2, 2, 5),
        Stage(6, 80, 3, 2, 3),
        Stage(6, 112, 3, 1, 5),
        Stage(6, 192, 4, 2, 5),
        Stage(6, 320, 1, 1, 3),
    )
    act: Literal["relu6", "silu"] = "silu"
    se_ratio: float = 0.25
    drop_path_rate: float = 0.2


class EfficientNet(MobileNetV2):
    """Compound-scaled network of `EfficientNet <https://arxiv.org/abs/1905.11946>`_.

    MobileNetV2's blocks with a squeeze-and-excitation gate, and SiLU instead of ReLU6.

    Args:
        config: which one.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.

    Shapes:
        - input: :math:`(N, C, H, W)`
        - output: :math:`(N, K)`
    """

    def __init__(
        self, config: EfficientNetConfig = EfficientNetConfig(), num_classes: int = 1000, in_chans: int = 3
    ) -> None:
        super().__init__(config, num_classes, in_chans)


# Name: width, depth, image size, dropout; parameters and multiply-adds as published.
_SIZES = {
    "b0": (1.0, 1.0, 224, 0.2, 5_288_548, 0.39e9),
    "b1": (1.0, 1.1, 240, 0.2, 7_794_184, 0.70e9),
    "b2": (1.1, 1.2, 260, 0.3, 9_109_994, 1.0e9),
    "b3": (1.2, 1.4, 300, 0.3, 12_233_232, 1.83e9),
    "b4": (1.4, 1.8, 380, 0.4, 19_341_616, 4.39e9),
    "b5": (1.6, 2.2, 456, 0.4, 30_389_784, 10.27e9),
    "b6": (1.8, 2.6, 528, 0.5, 43_040_704, 19.07e9),
    "b7": (2.0, 3.1, 600, 0.5, 66_347_960, 37.75e9),
    "b8": (2.2, 3.6, 672, 0.5, 87.4e6, None),
}
# The authors' multiply-adds (407 M for lite0) are left out: they count norms and activations too.
_LITE_SIZES = {
    "lite0": (1.0, 1.0, 224, 0.2, 4.65e6, None),
    "lite1": (1.0, 1.1, 240, 0.2, 5.42e6, None),
    "lite2": (1.1, 1.2, 260, 0.3, 6.09e6, None),
    "lite3": (1.2, 1.4, 280, 0.3, 8.20e6, None),
    "lite4": (1.4, 1.8, 300, 0.3, 13.01e6, None),
}
_LITE = EfficientNetConfig(act="relu6", se_ratio=0.0, fixed_ends=True)


def _with_experts(count: int) -> EfficientNetConfig:
    stages = EfficientNetConfig.stages
    return EfficientNetConfig((*stages[:-3], *(stage._replace(experts=count) for stage in stages[-3:])))


_CC4_SIZES = {"cc_b0_4e": (1.0, 1.0, 224, 0.2, 13.31e6, None)}
_CC8_SIZES = {
    "cc_b0_8e": (1.0, 1.0, 224, 0.2, 24.01e6, 413e6),
    "cc_b1_8e": (1.0, 1.1, 240, 0.2, 39.72e6, None),
}


def _rows() -> dict[str, Variant]:
    rows = {}
    for sizes, base, source in (
        (
            _SIZES,
            EfficientNetConfig(),
            "torchvision's table (b8: timm's); the paper prints 4.2 and 9.9 G for b4 and b5",
        ),
        (_LITE_SIZES, _LITE, "the authors' model page (tensorflow/tpu, efficientnet/lite)"),
        (_CC4_SIZES, _with_experts(4), "timm's model cards"),
        (_CC8_SIZES, _with_experts(8), "timm's model cards, and the paper's multiply-adds"),
    ):
        for name, (width, depth, size, drop, params, macs) in sizes.items():
            config = replace(base, width=width, depth=depth, drop_rate=drop)
            tf = replace(config, padding="same", norm_eps=1e-3)
            for prefix, one in (("", config), ("tf_", tf)):
                rows[f"{prefix}efficientnet_{name}"] = Variant(
                    EfficientNet, one, params, macs, size=size, source=source
                )
    return rows


VARIANTS = {
    **_rows(),
    "efficientnet_test": Variant(
        EfficientNet,
        EfficientNetConfig((Stage(1, 8, 1, 1), Stage(3, 16, 2, 2, 5)), stem_width=8, head_width=32),
        size=32,
        classes=10,
    ),
    "efficientnet_cc_test": Variant(
        EfficientNet,
        EfficientNetConfig(
            (Stage(1, 8, 1, 1), Stage(3, 16, 2, 2, 5, experts=3)),
            stem_width=8, head_width=32, padding="same", norm_eps=1e-3,
        ),
        size=32,
        classes=10,
    ),
    "tf_efficientnet_test": Variant(
        EfficientNet,
        EfficientNetConfig(
            (Stage(1, 8, 1, 1), Stage(3, 16, 1, 2, 5), Stage(3, 16, 1, 2)),
            stem_width=8, head_width=32, padding="same", norm_eps=1e-3,
        ),
        size=32,
        classes=10,
    ),
}  # fmt: skip
