"""Nested sparse subnets trained together, stored once and read as prefixes, come within a point of networks trained
for one sparsity each, where cutting the densest of them further fails.

The store is that of ResNet-18 at sparsities of 80, 90 and 95%. The training is a residual network of eight layers on
scikit-learn's digits, dense for 8 epochs, then 10 epochs for all subnets together or for each network alone, all with
the same recipe; masks follow the magnitudes each epoch in the first half and stay in the second.
"""

import copy
import itertools
import math
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.adaptive.dress import SparseSubnets
from omniconv.core.seeds import derive
from omniconv.core.weights import save_weights
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, digits, train

SPARSITIES = (0.8, 0.9, 0.95)
ERROR = 1e-6
STORED = 0.02
SAVED = 0.4
WITHIN = -1.0
ABOVE = 3.0
SEEDS = (0, 1, 2)
DENSE_EPOCHS, EPOCHS = 8, 10
RECIPE = {"batch": 64, "lr": 3e-3, "shift": 1, "flip": False}


def store(check: Check) -> None:
    """Masks, rows, products and bytes of ResNet-18."""
    torch.manual_seed(0)
    subnets = SparseSubnets(create_model("resnet18"), SPARSITIES)
    masks = [subnets.masks(k) for k in range(len(SPARSITIES))]
    outside = sum(
        int((small & ~large[name]).sum())
        for large, smaller in itertools.pairwise(masks)
        for name, small in smaller.items()
    )
    uneven = sum(
        int((mask.flatten(1).sum(1) != mask[0].sum()).sum()) for layers in masks for mask in layers.values()
    )
    check.require("weights of a subnet that the larger ones lack", outside, "==", 0)
    check.require("rows with another number of weights than their layer's others", uneven, "==", 0)

    error, copied, formula, separate = 0.0, 0, 0, 0
    for name, rows in subnets.packed_rows().items():
        outputs, columns = rows.shape[0], rows.shape[1:].numel()
        index = 1 if columns <= 256 else 2
        formula += outputs * round(columns * (1 - SPARSITIES[0])) * (4 + index)
        for k, sparsity in enumerate(SPARSITIES):
            separate += outputs * round(columns * (1 - sparsity)) * (4 + index) + 4 * (outputs + 1)
            values, indices = rows.prefix(k)
            copied += (values.data_ptr() != rows.values.data_ptr()) + (
                indices.data_ptr() != rows.columns.data_ptr()
            )
            x = torch.randn(2, columns, dtype=torch.float64)
            weight = subnets.model.get_submodule(name).get_parameter("weight") * masks[k][name]
            expected = x @ weight.detach().flatten(1).double().T
            error = max(error, float((rows.matmul(x, k) - expected).abs().max() / expected.abs().max()))
    check.require("relative error of products with prefixes", error, "<=", ERROR)
    check.require("copies that switching makes", copied, "==", 0)
    norms = sum(m.num_features for m in subnets.model.modules() if isinstance(m, nn.BatchNorm2d))
    rest = 4 * 4 * norms * len(SPARSITIES) + 4 * 1000
    with tempfile.TemporaryDirectory() as folder:
        save_weights(path := Path(folder) / "subnets.safetensors", subnets.packed_state(), {})
        stored = path.stat().st_size
    check.require("stored bytes beside the formula", abs(stored / (formula + rest) - 1), "<=", STORED)
    check.require(
        "share of bytes saved over three matrices in CSR", 1 - stored / (separate + rest), ">=", SAVED
    )


def joint_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of the subnets."""
    return torch.stack([F.cross_entropy(output, labels) for output in outputs]).mean()


def trained(dense: nn.Module, sparsities: tuple[float, ...], data: Split, seed: int) -> SparseSubnets:
    """Train subnets together; with one sparsity it is a network of its own."""
    subnets = SparseSubnets(dense, sparsities)

    def follow(step: int, steps: int) -> None:
        if step == steps // 2:
            subnets.fix()
        elif step % math.ceil(steps / EPOCHS) == 0:
            subnets.resample()

    train(subnets, data, epochs=EPOCHS, seed=seed, after_step=follow, loss=joint_loss, **RECIPE)
    subnets.recalibrate(data[0].split(130))
    return subnets


def run(check: Check) -> None:
    """Measure the store and the subnets."""
    store(check)
    data, test = digits()
    right: dict[str, list[list[float]]] = defaultdict(list)
    for seed in SEEDS:
        torch.manual_seed(derive(seed, "weights"))
        dense = create_model("resnet20_cifar", depths=(1, 1, 1), in_chans=1, num_classes=10)
        train(dense, data, epochs=DENSE_EPOCHS, seed=seed, **RECIPE)
        right["dense"].append([accuracy(dense, test)])
        subnets = trained(dense, SPARSITIES, data, seed)
        right["DRESS"].append([accuracy(subnets.extract(k), test) for k in range(len(SPARSITIES))])
        alone = [trained(dense, (sparsity,), data, seed) for sparsity in SPARSITIES]
        right["alone"].append([accuracy(one.extract(0), test) for one in alone])
        # The densest network, cut further and with statistics of its own, as any subnet has.
        cut = SparseSubnets(copy.deepcopy(alone[0].extract(0)), SPARSITIES)
        cut.recalibrate(data[0].split(130))
        right["cut"].append([accuracy(cut.extract(k), test) for k in range(len(SPARSITIES))])
    means = {
        name: [statistics.mean(column) for column in zip(*rows, strict=True)] for name, rows in right.items()
    }
    for k, sparsity in enumerate(SPARSITIES):
        check.require(
            f"accuracy of the {sparsity:.0%} subnet above a network of its own, mean of {len(SEEDS)} seeds",
            means["DRESS"][k] - means["alone"][k], ">=", WITHIN, baseline=means["alone"][k], unit="points",
        )  # fmt: skip
    for k, sparsity in list(enumerate(SPARSITIES))[1:]:
        check.require(
            f"accuracy of the {sparsity:.0%} subnet above the 80% network cut to it, mean of {len(SEEDS)} seeds",
            means["DRESS"][k] - means["cut"][k], ">=", ABOVE, baseline=means["cut"][k], unit="points",
        )  # fmt: skip
    check.note(f"accuracies by seed: {dict(right)}")
