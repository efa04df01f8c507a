"""Layouts, sparsifiers, operators and the builder against masked dense tensors."""

import logging
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.ops.sparse import (
    Format,
    Layout,
    register_operator,
    register_sparsifier,
    sparsified,
    sparsify,
    sparsify_model,
)  # fmt: skip
from omniconv.ops.sparse.layouts import COO, CSR, NM, Block, GroupedNM, Masked
from omniconv.ops.sparse.sparsifiers import (
    BlockFraction,
    GroupedNOfM,
    KeepAll,
    NOfM,
    RandomFraction,
    ScalarFraction,
    ScalarThreshold,
)  # fmt: skip

LAYOUTS = {
    Masked: RandomFraction(0.6),
    COO: ScalarFraction(0.7),
    CSR: ScalarThreshold(0.8),
    NM: NOfM(2, 5),
    Block: BlockFraction(0.5, (2, 3)),
    GroupedNM: GroupedNOfM(2, 4, 2),
}


def weight(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(14, 23), (5, 3, 3, 2)])
def test_layouts_keep_what_their_mask_says(layout, shape):
    dense = weight(*shape)
    sparse = sparsify(dense, LAYOUTS[layout], layout)
    assert type(sparse) is layout
    assert sparse.shape == dense.shape
    assert torch.equal(sparse.dense(), torch.where(sparse.mask, dense, 0))
    other = weight(*shape)
    assert torch.equal(sparse.with_values(sparse.take(other)).dense(), torch.where(sparse.mask, other, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_get_the_gradient_of_the_entries_kept(layout):
    dense = weight(14, 23).requires_grad_()
    probe = weight(14, 23)
    sparse = sparsify(dense, LAYOUTS[layout], layout)
    (sparse.dense() * probe).sum().backward()
    assert torch.equal(dense.grad, torch.where(sparse.mask, probe, 0))


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", [Tensor, *LAYOUTS])
def test_any_two_layouts_multiply_and_add(first, second):
    a = sparsify(weight(14, 23), LAYOUTS[first], first)
    b = sparsify(weight(23, 10), LAYOUTS.get(second, KeepAll()), second)
    plain = b.dense() if isinstance(b, Layout) else b
    torch.testing.assert_close(a @ b, a.dense() @ plain)
    torch.testing.assert_close(torch.mm(a, b), a.dense() @ plain)
    torch.testing.assert_close(plain.T @ sparsify(a.dense().T, KeepAll(), COO), plain.T @ a.dense().T)
    c = sparsify(weight(14, 23), LAYOUTS.get(second, KeepAll()), second)
    plain = c.dense() if isinstance(c, Layout) else c
    torch.testing.assert_close(a + c, a.dense() + plain)
    torch.testing.assert_close(c + a, a.dense() + plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_take_layouts_for_weights(layout):
    kernels = sparsify(weight(7, 3, 3, 2), LAYOUTS[layout], layout)
    x, bias = weight(2, 3, 9, 8), weight(7)
    options = {"stride": 2, "padding": (1, 2), "dilation": (1, 2)}
    expected = F.conv2d(x, kernels.dense(), bias, **options)
    torch.testing.assert_close(F.conv2d(x, kernels, bias, **options), expected)
    matrix = sparsify(weight(14, 23), LAYOUTS[layout], layout)
    for shape in ((23,), (3, 23), (2, 3, 23)):
        x = weight(*shape)
        torch.testing.assert_close(F.linear(x, matrix), F.linear(x, matrix.dense()))


def test_registered_operators_are_not_computed_dense(caplog):
    a = {
        layout: sparsify(weight(14, 23), LAYOUTS[layout], layout) for layout in (Masked, COO, CSR, GroupedNM)
    }
    with caplog.at_level(logging.WARNING, "omniconv"):
        for sparse in a.values():
            _ = sparse @ weight(23, 2), F.linear(weight(2, 23), sparse, weight(14))
        for layout in (Masked, GroupedNM):
            module = sparsify_model(
                nn.Conv2d(3, 4, 2), {"weight": Format(external=LAYOUTS[layout], layout=layout)}
            )
            module(torch.randn(2, 3, 5, 5))
    assert not caplog.records


def test_exact_counts():
    dense = weight(24, 40)
    assert sparsify(dense, ScalarFraction(0.9), COO).values.numel() == 96
    assert int(RandomFraction(0.25).mask(dense).sum()) == 720
    assert (NOfM(2, 4).mask(dense).unflatten(1, (-1, 4)).sum(2) == 2).all()
    assert (GroupedNOfM(1, 10, 2).mask(dense[:20]).unflatten(1, (-1, 10)).sum(2) == 1).all()
    with pytest.raises(ValueError, match="fraction must lie in"):
        ScalarFraction(1.5).mask(dense)


def test_every_pattern_has_g_rows():
    mask = GroupedNOfM(2, 4, 3).mask(weight(36, 8))
    patterns = mask.unflatten(0, (2, 18)).unflatten(2, (2, 4)).int() @ torch.tensor(
        [1, 2, 4, 8], dtype=torch.int32
    )
    for chunk in range(2):
        for block in range(2):
            assert patterns[chunk, :, block].unique(return_counts=True)[1].tolist() == [3] * 6


def test_layouts_that_take_no_mask_say_so():
    with pytest.raises(
        TypeError, match="NM cannot keep any mask; use a sparsifier that is registered for it"
    ):
        sparsify(weight(4, 4), ScalarFraction(0.5), NM)


def test_a_missing_operator_is_warned_about_once(caplog):
    @dataclass(frozen=True, eq=False)
    class Copied(Masked):
        pass

    a = sparsify(weight(4, 6), ScalarFraction(0.5), Copied)
    with caplog.at_level(logging.WARNING, "omniconv"):
        for _ in range(3):
            torch.testing.assert_close(a @ weight(6, 2).mul_(0), torch.zeros(4, 2, dtype=torch.float64))
            torch.testing.assert_close(torch.relu(a), a.dense().relu())
    assert [record.getMessage() for record in caplog.records] == [
        "matmul of Copied is computed dense; register_operator can change that",
        "relu of Copied is computed dense; register_operator can change that",
    ]


def test_a_layout_of_ones_own_takes_thirty_lines(caplog):
    # From here ...
    @dataclass(frozen=True, eq=False)
    class Rows(Layout):
        """Whole rows."""

        values: Tensor
        rows: Tensor
        shape: torch.Size

        def dense(self):
            return self.values.new_zeros(self.shape).index_copy(0, self.rows, self.values)

        def take(self, dense):
            return dense[self.rows]

    @dataclass(frozen=True)
    class LongestRows:
        count: int

    @register_sparsifier(LongestRows, Rows)
    def keep(sparsifier, dense):
        rows = dense.detach().norm(dim=1).topk(sparsifier.count).indices
        return Rows(dense[rows], rows, dense.shape)

    @register_operator(torch.matmul, (Rows,))
    def multiply(a, b):
        return b.new_zeros(a.shape[0], b.shape[1]).index_copy(0, a.rows, a.values @ b)

    # ... to here.
    a, b = sparsify(weight(9, 5), LongestRows(3), Rows), weight(5, 4)
    with caplog.at_level(logging.WARNING, "omniconv"):
        torch.testing.assert_close(a @ b, a.dense() @ b)
    assert not caplog.records
    assert int((a.dense() != 0).any(1).sum()) == 3


def test_four_things_follow_an_operator():
    a, b = weight(6, 5), weight(5, 8)
    format = Format(ScalarThreshold(0.5), COO, ScalarFraction(0.75), CSR)
    result = sparsified(torch.matmul, format)(a, b)
    assert type(result) is CSR
    expected = a @ b
    kept = expected.abs() >= expected.abs().flatten().topk(12).values[-1]
    assert torch.equal(result.dense(), torch.where(kept, expected, 0))


def test_operators_that_give_a_layout_get_the_inline_sparsifier():
    a = sparsify(weight(6, 5), ScalarFraction(0.5), Masked)
    b = sparsify(weight(6, 5), ScalarFraction(0.5), Masked)
    result = sparsified(torch.add, Format(ScalarFraction(0.8), Masked, KeepAll(), Masked))(a, b)
    assert int(result.mask.sum()) == 6
    whole = sparsified(torch.add, Format(temporary=Masked, layout=Masked))(a, b)
    assert torch.equal(whole.kept, a.kept | b.kept)


def test_gradients_have_formats_too():
    x = weight(6, 5).requires_grad_()
    gradient = Format(external=ScalarFraction(0.5), layout=COO)
    y = sparsified(torch.mul, Format(layout=CSR), gradient)(x, 2.0)
    probe = weight(6, 5)
    (y.dense() * probe).sum().backward()
    assert torch.equal(x.grad, 2 * ScalarFraction(0.5).mask(probe) * probe)


def small_cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 5)
    ).double()  # fmt: skip


FORMATS = {
    "0.weight": Format(external=ScalarFraction(0.5), layout=COO),
    "2.weight": Format(external=GroupedNOfM(2, 4, 1), layout=GroupedNM),
    "5.weight": Format(external=BlockFraction(0.5, (1, 4)), layout=Block),
}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_rewritten_network_trains_as_the_masked_one(optimizer):
    plain = small_cnn()
    sparse = sparsify_model(plain, FORMATS)
    masks = {name: sparse.get_submodule(name.split(".")[0]).weight.mask for name in FORMATS}
    for name, mask in masks.items():
        plain.get_parameter(name).data.mul_(mask)
    optimizers = [optimizer(model.parameters(), lr=1e-2, weight_decay=0.1) for model in (plain, sparse)]
    for step in range(5):
        x = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        outputs = [model(x) for model in (plain, sparse)]
        torch.testing.assert_close(outputs[1], outputs[0])
        for output, o in zip(outputs, optimizers, strict=True):
            o.zero_grad()
            output.square().sum().backward()
        for name, mask in masks.items():
            plain.get_parameter(name).grad.mul_(mask)
        for o in optimizers:
            o.step()
    for name, mask in masks.items():
        layout = sparse.get_submodule(name.split(".")[0]).weight
        torch.testing.assert_close(layout.dense(), plain.get_parameter(name).detach())
        assert torch.equal(layout.mask, mask)


def test_state_dictionaries_hold_values_and_places():
    sparse = sparsify_model(small_cnn(), FORMATS)
    torch.manual_seed(1)
    other = sparsify_model(nn.Sequential(*map(_redrawn, small_cnn())), FORMATS)
    x = weight(3, 2, 6, 6)
    assert not torch.allclose(sparse(x), other(x))
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(sparse(x), other(x))


def _redrawn(module):
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
    return module


def test_intermediates_and_their_gradients_are_sparse():
    plain, gradients = small_cnn(), []
    plain[2].register_forward_hook(lambda module, inputs, y: y.register_hook(gradients.append) and None)
    model = sparsify_model(
        plain,
        weight_gradients={"0.weight": Format(external=ScalarFraction(0.9))},
        intermediates={"1": Format(external=ScalarFraction(0.8), layout=COO)},
        intermediate_gradients={"2": Format(external=ScalarFraction(0.75))},
    )
    outputs = []
    model[1].register_forward_hook(lambda module, inputs, y: outputs.append(y))
    model(weight(3, 2, 6, 6)).square().sum().backward()
    assert type(outputs[0]) is COO
    assert outputs[0].values.numel() == round(0.2 * 3 * 6 * 36)
    assert 0 < int(gradients[0].count_nonzero()) <= 3 * 12 * 16 // 4
    gradient = model[0].parametrizations.weight.original.grad
    assert int(gradient.count_nonzero()) == 108 - round(0.9 * 108)
