"""SparseNet: a DenseNet whose layers read the outputs 1, 2, 4, 8, ... layers back.

Paper: Zhu et al., Sparsely Aggregated Convolutional Networks, https://arxiv.org/abs/1801.05895. The network is that of
`models/image/densenet.py` with `aggregation="sparse"`.
"""

from omniconv.models.backbone import Variant
from omniconv.models.image.densenet import DenseNet, DenseNetConfig, cifar_config
from omniconv.models.weights import Rules

__all__ = ["OFFICIAL_NAMES"]

OFFICIAL_NAMES: Rules = (
    *((rf"\bdense-stage-{index}\.", f"denseblock{index + 1}.") for index in range(3)),
    *((rf"\btransition-{index}\.", f"transition{index + 1}.") for index in range(2)),
    (r"\.block-(\d+)\.bn", r".denselayer\1.norm"),
    (r"\.block-", ".denselayer"),
    (r"(transition\d)\.bn1\.", r"\1.norm."),
    (r"(transition\d)\.conv1\.", r"\1.conv."),
    (r"\bnorm_last\.", "norm5."),
    (r"^classifier\.linear\.", "classifier."),
)
"""From the names of the official repository to ours."""


def _row(depth: int, growth_rates: tuple[int, ...], params: float | None, **more) -> Variant:
    config = cifar_config(depth, growth_rates, aggregation="sparse", **more)
    return Variant(DenseNet, config, params, size=32, classes=100)


VARIANTS = {
    "sparsenet_40_24_cifar": _row(40, (24, 24, 24), 0.76e6),
    "sparsenet_100_36_cifar": _row(100, (36, 36, 36), 5.65e6),
    "sparsenet_100_16_32_64_cifar": _row(100, (16, 32, 64), 7.22e6),
    "sparsenet_bc_100_24_cifar": _row(100, (24, 24, 24), 1.46e6, bottleneck=True),
    "sparsenet_bc_100_16_32_64_cifar": _row(100, (16, 32, 64), 4.38e6, bottleneck=True),
    # Published as 16.72M; the layout that gives every other count of the table has 17.34M.
    "sparsenet_bc_100_32_64_128_cifar": _row(100, (32, 64, 128), None, bottleneck=True),
    "sparsenet_test": Variant(
        DenseNet,
        DenseNetConfig((3, 1), (8, 12), aggregation="sparse", bottleneck=False, stem="3x3"),
        size=32,
    ),
}
