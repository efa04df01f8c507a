"""NASNet against its paper's counts and wiring."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

from omniconv.models.factory import create_model
from omniconv.models.image.nasnet import (
    NASNET_A,
    OPERATIONS,
    Block,
    CellSpec,
    Genotype,
    NASNetCell,
    NASNetConfig,
    SamePool,
    make_operation,
)


@pytest.mark.parametrize(
    ("name", "count", "features"),
    [("nasnetalarge", 88_753_150, 4032), ("nasnetamobile", 5_289_978, 1056), ("nasneta_cifar", None, 768)],
)
def test_exact_parameters_of_the_public_weights_and_penultimate_filters(name, count, features):
    model = create_model(name, device="meta")
    assert count in (None, sum(p.numel() for p in model.parameters()))
    assert model.num_features == features


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_or_halves_the_map(name):
    x = torch.randn(2, 4, 7, 10)
    for stride, size in ((1, (7, 10)), (2, (4, 5))):
        for out in (4, 6):
            assert make_operation(name, 4, out, stride)(x).shape == (2, out, *size)


def test_a_cell_computes_what_its_description_says():
    spec = CellSpec((Block("max_pool_3", 1, "identity", 0), Block("identity", 2, "avg_pool_3", 1, "concat")))
    cell = NASNetCell(spec, 6, 5, 4).eval()
    x, previous = torch.randn(2, 5, 6, 7), torch.randn(2, 4, 6, 7)
    prev, last = cell.conv_prev_1x1(previous), cell.conv_1x1(x)
    first = F.max_pool2d(last, 3, 1, 1) + prev
    second = torch.cat([first, F.avg_pool2d(last, 3, 1, 1, count_include_pad=False)], 1)
    torch.testing.assert_close(cell(x, previous), second)
    assert cell.out_channels == 12


def test_halving_paths_see_every_second_pixel_and_the_others():
    cell = NASNetCell(NASNET_A.normal, 4, 5, 3, previous="halve").eval()
    torch.nn.init.ones_(cell.path_1.conv.weight)
    torch.nn.init.ones_(cell.path_2.conv.weight)
    x = torch.rand(1, 3, 5, 6)
    y = cell.adapt(x) * (1 + 1e-3) ** 0.5
    sums = x.sum(1)
    torch.testing.assert_close(y[:, 0], sums[:, ::2, ::2])
    torch.testing.assert_close(y[:, 3], F.pad(sums[:, 1::2, 1::2], (0, 0, 0, 1)))


def test_pooling_pads_at_the_end():
    x = torch.randn(1, 2, 6, 9)
    padded = F.pad(x, (1, 1, 0, 1), value=-torch.inf)
    torch.testing.assert_close(SamePool("max", 3)(x), F.max_pool2d(padded, 3, 2))


def test_paths_are_dropped_by_the_schedule():
    torch.manual_seed(0)
    model = create_model("nasnet_test", num_classes=3, drop_path_rate=0.5, drop_rate=0.0).double().train()
    x = torch.randn(2, 3, 40, 33, dtype=torch.float64)
    model.set_progress(0.0)
    torch.testing.assert_close(model(x), model(x))
    model.set_progress(1.0)
    assert (model(x) - model(x)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="progress must lie"):
        model.set_progress(2)


def test_auxiliary_head():
    model = create_model("nasnet_test", num_classes=3, aux=True)
    assert [y.shape for y in model.forward_with_aux(torch.randn(2, 3, 40, 33))] == [(2, 3)] * 2
    with pytest.raises(ValueError, match="make it with aux=True"):
        create_model("nasnet_test").forward_with_aux(torch.randn(2, 3, 40, 33))


def test_config_survives_json_and_refuses_wrong_cells():
    config = NASNetConfig(2, 8)
    assert NASNetConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    for block, message in (
        (Block("conv_9", 0, "identity", 1), "operations must be"),
        (Block("conv_1", 2, "identity", 1), "earlier states"),
    ):
        with pytest.raises(ValueError, match=message):
            NASNetConfig(genotype=Genotype(CellSpec((block,)), NASNET_A.reduction))
