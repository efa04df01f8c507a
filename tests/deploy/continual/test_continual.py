"""Every module that streams gives frame by frame what it gives for clips, at the cost of the new frame alone."""

import copy
import inspect
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from omniconv.deploy.continual import attention, container, conv, network, pool, stgcn
from omniconv.deploy.continual.attention import (
    RecyclingPositions,
    RetroactiveAttention,
    SingleOutputAttention,
)
from omniconv.deploy.continual.container import Parallel, Residual
from omniconv.deploy.continual.conv import ContinualConv1d
from omniconv.deploy.continual.network import ContinualNetwork, continual
from omniconv.deploy.continual.stgcn import STGCNBlock, skeleton_partitions
from omniconv.deploy.continual.stream import Stream, Window, count_step_macs
from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model

WASTE = 1.2
E, H, N, FF = 8, 2, 5, 12
BONES = skeleton_partitions([(0, 1), (1, 2), (1, 3)], 4)


@dataclass
class Case:
    """A clip network, a clip of one sample, and the least a new token costs where clips do not tell."""

    model: nn.Module
    shape: tuple[int, ...]
    axis: int = 2
    ideal: float | None = None


def encoder(layers, **kwargs):
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, FF, batch_first=True, **kwargs), layers, enable_nested_tensor=False
    )


class Head(nn.Module):
    """Reads an encoder's last token, or the mean of all."""

    def __init__(self, body, last):
        super().__init__()
        self.body, self.last, self.fc = body, last, nn.Linear(E, 3)

    def forward(self, x):
        y = self.body(x)
        return self.fc(y[:, -1] if self.last else y.mean(1))


class Sliced(nn.Module):
    """A residual network as people write it, with a shortcut cropped by hand."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(3, 4, 3, dilation=2)
        self.conv2 = nn.Conv1d(4, 4, 3)
        self.proj = nn.Conv1d(3, 4, 1)

    def forward(self, x):
        y = self.conv2(torch.relu(self.conv1(x)))
        return y * 2 + self.proj(x)[:, :, 3:-3]


class Pooled(nn.Module):
    """Ends with a mean over time and space, as most networks do."""

    def __init__(self, last=False):
        super().__init__()
        self.conv, self.last = nn.Conv3d(2, 4, 3, padding=(0, 1, 1)), last

    def forward(self, x):
        y = self.conv(x)
        return y[:, :, -1].flatten(1) if self.last else y.mean((2, 3, 4))


class Tokens(nn.Module):
    """Attention of this package, behind recycled positions."""

    def __init__(self, attend):
        super().__init__()
        self.positions, self.attend = RecyclingPositions(N, E), attend

    def forward(self, x):
        return self.attend(self.positions(x))


def seq(*layers):
    return nn.Sequential(*layers)


PROJECT = 4 * E * E
ATTEND = 2 * N * E
FIRST = 3 * E * E + N * E * E + 5 * N * E + 2 * N * E * FF
"""A retroactive encoder layer: new projections, all outputs, rows and columns, and the MLP of all tokens."""
CASES = {
    "conv1d": Case(seq(nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2)), (3, 11)),
    "conv1d-same": Case(seq(nn.Conv1d(3, 4, 4, dilation=2, padding="same"), nn.BatchNorm1d(4), nn.GELU()), (3, 7)),
    "conv1d-gaps": Case(seq(nn.Conv1d(3, 4, 2, stride=5)), (3, 13)),
    "conv2d": Case(seq(nn.Conv2d(3, 4, (3, 3), padding=(1, 1), groups=1, padding_mode="zeros")), (3, 8, 5)),
    "conv2d-reflect": Case(seq(nn.Conv2d(3, 3, (3, 3), padding=(0, 1), padding_mode="reflect", groups=3)), (3, 8, 5)),
    "conv3d": Case(seq(nn.Conv3d(2, 3, 3, (2, 1, 2), 1), nn.ReLU(), nn.Conv3d(3, 3, (3, 1, 1))), (2, 12, 5, 6)),
    "avgpool1d": Case(seq(nn.Conv1d(3, 4, 3), nn.AvgPool1d(4, 2, 1)), (3, 11)),
    "avgpool2d": Case(seq(nn.AvgPool2d((3, 2), padding=(1, 1)), nn.Conv2d(3, 2, 1)), (3, 9, 5)),
    "avgpool3d": Case(seq(nn.AvgPool3d(2, (1, 2, 2)), nn.Conv3d(3, 2, 1)), (3, 6, 5, 4)),
    "maxpool1d": Case(seq(nn.Conv1d(3, 4, 1), nn.MaxPool1d(3, 2, 1, dilation=2)), (3, 11)),
    "maxpool2d": Case(seq(nn.MaxPool2d((3, 2), (1, 2), padding=1)), (3, 9, 5)),
    "maxpool3d": Case(seq(nn.MaxPool3d((2, 3, 3), stride=2)), (3, 8, 7, 7)),
    "pad1d": Case(seq(nn.ZeroPad1d((2, 0)), nn.Conv1d(3, 4, 3)), (3, 7)),
    "pad2d": Case(seq(nn.ConstantPad2d((1, 0, 1, 2), 0.5), nn.Conv2d(3, 4, 2)), (3, 7, 4)),
    "pad3d": Case(seq(nn.ConstantPad3d((0, 1, 1, 0, 1, 1), 0.5), nn.Conv3d(3, 4, 2)), (3, 7, 4, 3)),
    "adaptive-avg1d": Case(seq(nn.Conv1d(3, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()), (3, 7)),
    "adaptive-avg2d": Case(seq(nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten()), (3, 12, 7)),
    "adaptive-avg3d": Case(seq(nn.Conv3d(3, 4, 3), nn.AdaptiveAvgPool3d(1)), (3, 7, 4, 5)),
    "adaptive-max1d": Case(seq(nn.Conv1d(3, 4, 3), nn.AdaptiveMaxPool1d(1), nn.Flatten()), (3, 7)),
    "adaptive-max2d": Case(seq(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten()), (3, 9, 5)),
    "adaptive-max3d": Case(seq(nn.Conv3d(3, 4, 3), nn.AdaptiveMaxPool3d((1, 2, 2))), (3, 7, 4, 5)),
    "space-only": Case(seq(nn.Conv3d(3, 4, (1, 3, 3)), nn.AdaptiveAvgPool3d((None, 1, 1))), (3, 5, 6, 6)),
    "mean": Case(Pooled(), (2, 7, 4, 5)),
    "last-frame": Case(Pooled(last=True), (2, 7, 4, 5)),
    "sliced": Case(Sliced(), (3, 12)),
    "residual": Case(
        seq(Residual(nn.Conv1d(3, 3, 5)), Residual(nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(3, 4, 1))), (3, 9)
    ),
    "parallel": Case(
        Parallel(nn.Conv1d(3, 2, 1), seq(nn.Conv1d(3, 3, 3), nn.Conv1d(3, 1, 3)), reduce="concat"), (3, 9)
    ),
    "stgcn": Case(
        seq(
            STGCNBlock(3, 4, BONES, kernel_size=5, residual=False),
            STGCNBlock(4, 4, BONES, kernel_size=3),
            STGCNBlock(4, 6, BONES, kernel_size=5, stride=2),
            STGCNBlock(6, 6, BONES, kernel_size=5, padding=2),
        ),
        (3, 21, 4),
    ),
    "single-output": Case(Tokens(SingleOutputAttention(E, H, N)), (N, E), 1, PROJECT + ATTEND),
    "retroactive": Case(Tokens(RetroactiveAttention(E, H, N)), (N, E), 1, 3 * E * E + N * E * E + 5 * N * E),
    "encoder-1-last": Case(Head(encoder(1), True), (N, E), 1, PROJECT + ATTEND + 2 * E * FF + 3 * E),
    "encoder-2-last": Case(
        Head(encoder(2, norm_first=True), True), (N, E), 1, FIRST + 3 * N * E * E + ATTEND + E * E + 2 * E * FF + 3 * E
    ),
    "encoder-2-mean": Case(
        Head(encoder(2), False), (N, E), 1, FIRST + 4 * N * E * E + 2 * N * N * E + 2 * N * E * FF + 3 * E
    ),
    "encoder-layer": Case(Head(encoder(1).layers[0], False), (N, E), 1, FIRST + 3 * E),
}  # fmt: skip


def prepared(case):
    """Return a case's model with statistics and biases that matter, and a stream of frames for it."""
    torch.manual_seed(0)
    model = copy.deepcopy(case.model).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1)
    shape = list(case.shape)
    frames = shape[case.axis - 1]
    shape[case.axis - 1] = 3 * frames + 2
    return model, torch.randn(2, *shape), frames


def clip_outputs(case, model, net, x, frames):
    """Return what the clip network gives for the whole stream, or for every window of it."""
    if isinstance(getattr(model, "attend", None), SingleOutputAttention) or net.whole:
        outputs = []
        for start in range(0, x.shape[case.axis] - frames + 1, net.time_stride):
            for module in model.modules():
                if isinstance(module, RecyclingPositions):
                    module.start = start
            y = model(x.narrow(case.axis, start, frames))
            outputs.append(y if net.whole else y[:, -1:])
        return outputs
    return list(model(x).split(1, case.axis))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.no_grad()
def test_a_stream_equals_the_clip_network_and_costs_one_frame(case):
    model, x, frames = prepared(case)
    net = continual(model, case.shape, axis=case.axis)
    assert list(net.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(net(x[:1]), model(x[:1]))
    wanted = clip_outputs(case, model, net, x, frames)

    got, first = [], None
    for time, frame in enumerate(x.unbind(case.axis)):
        y = net.forward_step(frame)
        if y is not None:
            first = time if first is None else first
            got.append(y)
    if not net.whole:
        got = [y.unsqueeze(case.axis) for y in got] + net.flush()
    net.reset_stream()
    # With a stride the last windows may not reach the end of the stream, or reach beyond it.
    assert len(wanted) <= len(got) <= len(wanted) + net.time_stride
    for ours, theirs in zip(got, wanted, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    if isinstance(net, ContinualNetwork) and first is not None:
        assert first == net.delay, "the delay is that of the first output"

    half = x.shape[case.axis] // 2
    parts = [
        net.forward_steps(x.narrow(case.axis, 0, half)),
        net.forward_steps(x.narrow(case.axis, half, x.shape[case.axis] - half), end=True),
    ]
    together = torch.cat([part for part in parts if part is not None], 1 if net.whole else case.axis)
    stacked = torch.stack(got, 1) if net.whole else torch.cat(got, case.axis)
    torch.testing.assert_close(together, stacked, rtol=1e-5, atol=1e-5)

    ideal = case.ideal
    if ideal is None:
        lengths = [list(case.shape), list(case.shape)]
        lengths[1][case.axis - 1] += 8 * net.time_stride
        short, long = (count_cost(model, tuple(shape)).macs for shape in lengths)
        ideal = (long - short) / (8 * net.time_stride)
    assert count_step_macs(net, case.shape) <= WASTE * ideal


def test_every_stream_has_a_case():
    seen = set()
    for case in CASES.values():
        net = continual(case.model, case.shape, axis=case.axis)
        seen |= {type(module) for module in net.modules()}
    public = {
        value
        for module in (attention, container, conv, network, pool, stgcn)
        for name, value in vars(module).items()
        if name in module.__all__ and inspect.isclass(value) and issubclass(value, Stream)
    }
    assert public - seen == set()


def test_a_layer_streams_by_itself():
    torch.manual_seed(0)
    layer = ContinualConv1d(2, 3, 3, padding=1).eval()
    assert (layer.receptive_field, layer.delay, layer.time_stride) == (3, 1, 1)
    x = torch.randn(1, 2, 6)
    assert layer.forward_step(x[:, :, 0]) is None
    torch.testing.assert_close(layer.forward_steps(x[:, :, 1:], end=True), layer(x).detach())
    with pytest.raises(ValueError, match="ContinualConv1d streams in eval mode only; call eval"):
        layer.train().forward_step(x[:, :, 0])


@torch.no_grad()
def test_a_state_is_a_value_and_streams_of_a_batch_do_not_mix(tmp_path):
    case = CASES["stgcn"]
    model, x, _ = prepared(case)
    net, other = (continual(model, case.shape) for _ in range(2))
    net.forward_steps(x[:, :, :30])
    state = net.stream_state()
    torch.save(state, tmp_path / "state.pt")
    wanted = net.forward_steps(x[:, :, 30:], end=True)
    other.load_stream_state(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(other.forward_steps(x[:, :, 30:], end=True), wanted, rtol=0, atol=0)
    net.load_stream_state(state)  # going on has not changed it
    torch.testing.assert_close(net.forward_steps(x[:, :, 30:], end=True), wanted, rtol=0, atol=0)
    assert all(value is None for value in net.stream_state().values())
    whole = net.forward_steps(x, end=True)
    for index in (0, 1):
        alone = net.forward_steps(x[index : index + 1], end=True)
        torch.testing.assert_close(alone, whole[index : index + 1], rtol=1e-5, atol=1e-5)
    double = net.double().forward_steps(x.double(), end=True)
    torch.testing.assert_close(double.float(), whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="the state is of another network"):
        continual(CASES["conv1d"].model, (3, 11)).load_stream_state(state)


@torch.no_grad()
def test_a_picture_network_streams_rows():
    """A line camera: rows of a picture come one by one through a real residual network."""
    torch.manual_seed(0)
    model = create_model("resnet18", features_only=True, out_indices=(2,)).eval()

    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            return self.body(x)[0]

    net = continual(Map(), (3, 32, 24))
    x = torch.randn(1, 3, 64, 24)
    torch.testing.assert_close(net.forward_steps(x, end=True), model(x)[0], rtol=1e-5, atol=1e-5)


def test_large_scores_do_not_overflow():
    torch.manual_seed(0)
    layer = RetroactiveAttention(4, 1, 6).eval().double()
    x = torch.randn(1, 60, 4, dtype=torch.float64) * torch.linspace(40, 1, 60)[None, :, None]
    with torch.no_grad():
        for time in range(60):
            y = layer.forward_step(x[:, time])
            if y is not None:
                torch.testing.assert_close(y, layer(x[:, time - 5 : time + 1]), rtol=1e-5, atol=1e-5)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = encoder(1).layers[0]

    def forward(self, x):
        return self.layer(x, is_causal=False)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3)

    def forward(self, x):
        return self.conv(self.conv(x))


class Gate(nn.Module):
    def forward(self, x):
        return x * x.mean(2, keepdim=True).sigmoid()


class Reshaped(nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0], -1)


class Begins(nn.Module):
    def forward(self, x):
        return x[:, :, :4]


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (seq(nn.Conv1d(3, 4, 3), nn.InstanceNorm1d(4)), (3, 9), r"1 \(InstanceNorm1d\): it mixes the frames"),
        (seq(nn.Conv1d(3, 4, 3), nn.LayerNorm(7)), (3, 9), r"1 \(LayerNorm\): it mixes the frames"),
        (nn.GRU(9, 4), (3, 9), r"GRU.*cannot|must return one tensor"),
        (
            Parallel(nn.Conv1d(3, 3, 2, 2), nn.AvgPool1d(4, 4)),
            (3, 8),
            "temporal strides 2 and 4, which cannot be",
        ),
        (
            seq(nn.AvgPool1d(2, ceil_mode=True)),
            (3, 9),
            r"0 \(ContinualAvgPool1d\): ceil_mode depends on the length",
        ),
        (Twice(), (3, 9), r"conv \(ContinualConv1d\): it is called twice"),
        (Gate(), (3, 9), r"mul.*joins single frames with a result over the whole clip"),
        (Reshaped(), (3, 9), "mixes the frames of a clip or depends on their number"),
        (Masked(), (N, E), "it streams with one argument, and it has more"),
        (Begins(), (3, 9), r"cuts a clip to a given length"),
        (
            nn.MultiheadAttention(4, 2, batch_first=True),
            (3, 9),
            "one input|RetroactiveAttention|cannot be traced",
        ),
        (Residual(nn.Conv1d(3, 3, 2)), (3, 9), "differ by an even number of frames"),
        (
            seq(nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular")),
            (3, 9),
            "padding over time must be zeros",
        ),
    ],
)
def test_what_cannot_stream_is_named(model, shape, message):
    with pytest.raises(ValueError, match=message):
        continual(model, shape, axis=1 if shape == (N, E) else 2)


def test_steps_are_cheap_in_memory_as_well():
    assert issubclass(ContinualConv1d, Window)
    net = continual(CASES["conv1d-gaps"].model, (3, 13))
    for _ in range(50):
        net.forward_step(torch.zeros(1, 3))
    (waiting,) = [state["frames"] for state in net.stream_state().values() if state and "frames" in state]
    assert len(waiting) < 5
