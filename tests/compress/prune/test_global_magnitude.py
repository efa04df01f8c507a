import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from omniconv.compress.prune.global_magnitude import global_magnitude, gradual_sparsity, magnitude_masks
from omniconv.models.factory import create_model

KINDS = (nn.Conv1d, nn.Conv2d, nn.Linear)


class FastGRNN(nn.Module):
    """A recurrent cell of linear layers, as the paper prunes beside convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(9, 32, bias=False)
        self.u = nn.Linear(32, 32, bias=False)
        self.gate = nn.Parameter(torch.zeros(32))
        self.head = nn.Linear(32, 6)

    def forward(self, x):
        h = x.new_zeros(len(x), 32)
        for t in range(x.shape[1]):
            z = self.w(x[:, t]) + self.u(h)
            gate = torch.sigmoid(z + self.gate)
            h = gate * h + (1 - gate) * torch.tanh(z)
        return self.head(h)


def mobile() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 32, 64):
        layers += [
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
        ]
        layers += [nn.ReLU(), nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


MODELS = {
    "resnet": lambda: create_model("resnet_test", num_classes=10),
    "mobile": mobile,
    "fastgrnn": FastGRNN,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, KINDS)}


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.98, 0.999])
@pytest.mark.parametrize("name", MODELS)
def test_it_equals_torch_prune_to_the_weight(name, sparsity):
    ours, report = global_magnitude(made(name), sparsity)
    theirs = made(name)
    layers = [(m, "weight") for m in theirs.modules() if isinstance(m, KINDS)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
    total = sum(w.numel() for w in prunable(ours).values())
    assert sum(int((w == 0).sum()) for w in prunable(ours).values()) == round(sparsity * total)
    for layer, weight in prunable(ours).items():
        assert torch.equal(weight, theirs.get_submodule(layer).weight), layer
    assert sum(layer.nonzero for layer in report.layers) == total - round(sparsity * total)


def test_the_input_stays_and_everything_else_is_copied():
    model = made("resnet")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned, _ = global_magnitude(model, 0.9)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    weights = {f"{layer}.weight" for layer in prunable(model)}
    for name, tensor in pruned.state_dict().items():
        same = tensor == state[name]
        assert (same | (tensor == 0) if name in weights else same).all(), name
        assert tensor.data_ptr() != model.state_dict()[name].data_ptr()
    assert type(pruned) is type(model)
    assert not any(p.grad_fn for p in pruned.parameters())


def test_ties_go_in_order():
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False))
    for layer in model:
        nn.init.ones_(layer.weight)
    pruned, _ = global_magnitude(model, 10 / 16)
    assert pruned[0].weight.count_nonzero() == 0
    assert pruned[1].weight.flatten().tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("floor", [1, 10, 20])
def test_the_floor_holds_at_unchanged_sparsity(floor):
    # The middle layer's weights are the smallest by far: without a floor it goes first.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50), nn.Linear(50, 2))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
        model[2].weight.mul_(2)
    total = sum(w.numel() for w in prunable(model).values())
    free, report = global_magnitude(model, 0.95)
    assert int(free[1].weight.count_nonzero()) == 0
    assert report.notes[0] == "No weight is left in 1; min_weights prevents that."
    floored, report = global_magnitude(model, 0.95, min_weights=floor)
    counts = {name: int(w.count_nonzero()) for name, w in prunable(floored).items()}
    assert min(counts.values()) >= floor
    assert counts["1"] == floor
    assert sum(counts.values()) == total - round(0.95 * total)
    # Its largest weights are those that stay.
    left = model[1].weight.abs()[floored[1].weight != 0]
    assert left.min() >= model[1].weight.abs()[floored[1].weight == 0].max()
    assert len(report.notes) == 1


def test_a_floor_nobody_reaches_changes_nothing():
    model = made("resnet")
    masks = magnitude_masks(model, 0.5)
    least = min(int(mask.sum()) for mask in masks.values())
    floored = magnitude_masks(model, 0.5, min_weights=least)
    assert all(torch.equal(masks[name], floored[name]) for name in masks)


def test_a_layer_below_the_floor_stays_whole():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 1))
    pruned, _ = global_magnitude(model, 0.9, min_weights=200)
    assert int(pruned[1].weight.count_nonzero()) == 100


def test_only_the_named_layers():
    model = made("fastgrnn")
    pruned, _ = global_magnitude(model, 0.5, layers=["w", "u"])
    assert torch.equal(pruned.head.weight, model.head.weight)
    zeros = sum(int((pruned.get_submodule(name).weight == 0).sum()) for name in ("w", "u"))
    assert zeros == round(0.5 * (9 * 32 + 32 * 32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model = made("fastgrnn").to(dtype)
    pruned, _ = global_magnitude(model, 0.9)
    total = sum(w.numel() for w in prunable(model).values())
    assert sum(int((w == 0).sum()) for w in prunable(pruned).values()) == round(0.9 * total)
    assert pruned.w.weight.dtype == dtype


def test_double_precision_decides_where_single_would_tie():
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1 + 1e-12, 1.0, 1 + 2e-12, 1 + 3e-12]]))
    pruned, _ = global_magnitude(model, 0.5)
    assert (pruned.weight != 0).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("schedule", ["cubic", "uniform"])
def test_gradual_sparsity_rises_from_start_to_end(schedule):
    values = [gradual_sparsity(step, 50, 0.1, 0.9, schedule=schedule) for step in range(-5, 60)]
    assert values[:6] == pytest.approx([0.1] * 6)
    assert values[-10:] == pytest.approx([0.9] * 10)
    assert values == sorted(values)


def test_gradual_sparsity_at_known_points():
    # Zhu and Gupta, equation 1, at half time: 0.9 - 0.8 / 8.
    assert gradual_sparsity(25, 50, 0.1, 0.9) == pytest.approx(0.8)
    assert gradual_sparsity(25, 50, 0.1, 0.9, schedule="uniform") == pytest.approx(0.5)


def test_gradual_sparsity_errors():
    with pytest.raises(ValueError, match="schedule must be cubic or uniform: got 'linear'"):
        gradual_sparsity(1, 2, 0, 1, schedule="linear")
    with pytest.raises(ValueError, match="steps must be positive: got 0"):
        gradual_sparsity(1, 0, 0, 1)
