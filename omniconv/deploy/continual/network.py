"""`continual`: any network for clips, as one that takes a frame at a time, with the same weights and keys.

Paper: Hedegaard, Efficient Online Processing with Deep Neural Networks, https://arxiv.org/abs/2306.13474. The network
is traced with torch.fx. Convolutions, pooling, attention and what slices or averages time become streams. Everything
else must treat each frame alone, which is measured on a random clip, so that it holds for layers that nobody here
has heard of, and a norm over time is refused by name.
"""

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from omniconv.deploy.continual.attention import attention_twin, prepare_attention
from omniconv.deploy.continual.container import join
from omniconv.deploy.continual.conv import ContinualConv1d, ContinualConv2d, ContinualConv3d
from omniconv.deploy.continual.pool import ClipMean, Crop, Latest, pooling_twins
from omniconv.deploy.continual.stream import Span, Stream, Window

__all__ = ["ContinualNetwork", "continual"]

_CONVS = {nn.Conv1d: ContinualConv1d, nn.Conv2d: ContinualConv2d, nn.Conv3d: ContinualConv3d}
_MEANS = ("mean", torch.mean)


class _Tracer(fx.Tracer):
    """Follows a network down to torch's own layers and to streams."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Stream) or super().is_leaf_module(m, module_qualified_name)


@dataclass
class _Plan:
    """How the nodes of a traced network stream, by their names.

    Attributes:
        graph: the network.
        streams: the module that computes the node, for those that compute over time.
        sources: the nodes whose frames it takes; constants have none.
        axes: of time in what it gives; None for results over whole windows.
        spans: of it, from the network's input on.
    """

    graph: fx.Graph
    streams: dict[str, str] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    axes: dict[str, int | None] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)

    @property
    def result(self) -> str:
        """Name of the node that the network returns."""
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        return output.args[0].name


class ContinualNetwork(Stream):
    """A network that `continual` made: `forward` takes clips as before, `forward_step` and `forward_steps` frames.

    Its modules, parameters and state-dict keys are those of the network it was made from.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, axis: int) -> None:
        super().__init__()
        self._modules = root._modules
        self._parameters = root._parameters
        self._buffers = root._buffers
        self._non_persistent_buffers_set = root._non_persistent_buffers_set
        self.training = root.training
        self.axis = axis
        self._plan = _Plan(graph)
        for node in graph.nodes:
            constant = root.__dict__.get(str(node.target))
            if node.op == "get_attr" and isinstance(constant, Tensor):
                self.register_buffer(str(node.target), constant, persistent=False)

    @property
    def whole(self) -> bool:  # type: ignore[override]  # of this network rather than of the class
        """Whether every output is one of the clip network for a whole window, rather than a frame."""
        return self._plan.axes[self._plan.result] is None

    @property
    def span(self) -> Span:
        """Which frames an output depends on."""
        return self._plan.spans[self._plan.result]

    @property
    def _out_axis(self) -> int:
        axis = self._plan.axes[self._plan.result]
        return self.axis if axis is None else axis

    def forward(self, clip: Tensor) -> Tensor:
        """Return what the network gives for a clip."""
        values: dict[str, Any] = {}
        for node in self._plan.graph.nodes:
            values[node.name] = clip if node.op == "placeholder" else self.call(node, values)
        return values["output"]

    def call(self, node: fx.Node, values: dict[str, Any]) -> Any:
        """Compute a node of the graph from the values of those before it."""
        args = fx.map_arg(node.args, lambda n: values[n.name])
        kwargs = fx.map_arg(node.kwargs, lambda n: values[n.name])
        target: Any = node.target
        if node.op == "output":
            return args[0]
        if node.op == "get_attr":
            value: Any = self
            for name in target.split("."):
                value = getattr(value, name)
            return value
        if node.op == "call_module":
            return self.get_submodule(target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def steps(self, frames: list[Tensor]) -> list[Tensor]:
        """Take new frames and return the outputs that they complete."""
        return self._run(frames, end=False)

    def flush(self) -> list[Tensor]:
        """Return the outputs that need padding behind the last frame."""
        return self._run([], end=True)

    def _run(self, frames: list[Tensor], end: bool) -> list[Tensor]:
        came: dict[str, list[Any]] = {}
        constants: dict[str, Any] = {}
        waiting: dict[str, list[list[Any]]] = self._stream or {}
        for node in self._plan.graph.nodes:
            name, sources = node.name, self._plan.sources.get(node.name)
            if node.op == "placeholder":
                came[name] = frames
            elif node.op == "output":
                self._stream = waiting
            elif sources is None:
                constants[name] = self.call(node, constants)
            elif name in self._plan.streams:
                stream = self.get_submodule(self._plan.streams[name])
                assert isinstance(stream, Stream)
                came[name] = stream.steps(came[sources[0]]) + (stream.flush() if end else [])
            else:
                queues = [came[source] for source in sources]
                if len(sources) > 1:
                    before = waiting.get(name, [[] for _ in sources])
                    queues = [old + new for old, new in zip(before, queues, strict=True)]
                    count = min(map(len, queues))
                    waiting = waiting | {name: [queue[count:] for queue in queues]}
                    queues = [queue[:count] for queue in queues]
                came[name] = self._each(node, dict(zip(sources, queues, strict=True)), constants)
        return came[self._plan.result]

    def _each(self, node: fx.Node, frames: dict[str, list[Any]], constants: dict[str, Any]) -> list[Any]:
        """Compute a node that treats each frame alone, for frames together or result by result."""
        count = len(next(iter(frames.values())))
        axes: dict[str, Any] = {name: self._plan.axes[name] for name in frames}
        axis = self._plan.axes[node.name]
        if count > 1 and axis is not None and None not in axes.values():
            clips = {name: torch.cat(frames[name], axes[name]) for name in frames}
            return list(self.call(node, constants | clips).split(1, axis))
        return [
            self.call(node, constants | {name: queue[index] for name, queue in frames.items()})
            for index in range(count)
        ]


class _Converter:
    """Decides node by node how a traced network streams, following a random clip through it."""

    def __init__(self, network: ContinualNetwork, clip: Tensor) -> None:
        self.network = network
        self.plan = network._plan
        self.clip = clip
        self.values: dict[str, Any] = {}

    def convert(self) -> None:
        network, plan = self.network, self.plan
        for node in list(plan.graph.nodes):
            name = node.name
            live = [n for n in node.all_input_nodes if n.name in plan.axes]
            if node.op == "placeholder":
                if plan.axes:
                    raise ValueError(f"a stream has one input, but the network has also {name!r}")
                plan.axes[name], plan.spans[name] = network.axis, Span()
                self.values[name] = self.clip
                continue
            self.values[name] = network.call(node, self.values)
            if node.op == "output":
                if not isinstance(node.args[0], fx.Node) or not isinstance(self.values[name], Tensor):
                    raise ValueError("the network must return one tensor to stream")
            elif live:
                try:
                    self._convert(node, live)
                except ValueError as error:
                    raise ValueError(f"{self._describe(node)}: {error}") from None
        if not plan.axes.keys() >= {plan.result}:
            raise ValueError("the network's output does not depend on its input")

    def _describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{node.target} ({type(self.network.get_submodule(str(node.target))).__name__})"
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
        return f"{name} ({node.name})"

    def _convert(self, node: fx.Node, live: list[fx.Node]) -> None:
        plan = self.plan
        plan.sources[node.name] = [n.name for n in live]
        axes: list[Any] = [plan.axes[n.name] for n in live]
        self._span(node, live)
        if node.target is join and None not in axes:
            self._join(node, live)
        elif all(axis is None for axis in axes):
            plan.axes[node.name] = None
        elif None in axes:
            raise ValueError("it joins single frames with a result over the whole clip, so it cannot stream")
        elif len(live) == 1 and self._stream(node, live[0], axes[0]):
            pass
        else:
            plan.axes[node.name] = self._frame_axis(node, live)

    def _span(self, node: fx.Node, live: list[fx.Node]) -> None:
        spans = [self.plan.spans[n.name] for n in live]
        if len({span.stride for span in spans}) > 1:
            strides = " and ".join(str(span.stride) for span in spans)
            raise ValueError(f"its inputs have temporal strides {strides}, which cannot be aligned")
        total = spans[0]
        for span in spans[1:]:
            total = total.join(span)
        self.plan.spans[node.name] = total

    def _use(self, node: fx.Node, stream: Stream, name: str, axis: int | None) -> bool:
        """Let a stream compute a node."""
        plan = self.plan
        plan.streams[node.name] = name
        plan.spans[node.name] = plan.spans[node.name].then(stream.span)
        plan.axes[node.name] = None if stream.whole else axis
        return True

    def _add(self, node: fx.Node, stream: Stream, axis: int | None) -> bool:
        """Let a stream that no module of the network stands for compute a node."""
        name = f"stream_{node.name}"
        self.network.add_module(name, stream.eval())
        return self._use(node, stream, name, axis)

    def _stream(self, node: fx.Node, source: fx.Node, axis: int) -> bool:
        """Make a node a stream if it computes over time; return whether it does."""
        if node.op == "call_module":
            return self._module(node, source, axis)
        value = self.values[source.name]
        frames = value.shape[axis]
        args: Any = node.args
        if node.target in _MEANS:
            given: Any = args[1] if len(args) > 1 else node.kwargs.get("dim", tuple(range(value.ndim)))
            dims = tuple(d % value.ndim for d in ((given,) if isinstance(given, int) else given))
            if axis in dims:
                keepdim = node.kwargs.get("keepdim", args[2] if len(args) > 2 else False)
                return self._add(node, ClipMean(dims, frames, keepdim=bool(keepdim), axis=axis), None)
        if getattr(node.target, "__name__", "") == "getitem":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if len(index) > axis and all(isinstance(i, slice | int) for i in index):
                return self._getitem(node, index, axis, frames)
        return False

    def _getitem(self, node: fx.Node, index: tuple[Any, ...], axis: int, frames: int) -> bool:
        if any(i != slice(None) for place, i in enumerate(index) if place != axis):
            return False
        time = index[axis]
        if time == -1:
            return self._add(node, Latest(frames, axis=axis), None)
        if isinstance(time, int) or time.step not in (None, 1):
            raise ValueError("it picks frames by their place in the clip, so it cannot stream")
        before, after = time.start or 0, -(time.stop or 0)
        if before < 0 or after < 0:
            raise ValueError("it cuts a clip to a given length, so it cannot stream; cut as in [:, :, 1:-1]")
        return self._add(node, Crop(before, after, axis=axis), axis)

    def _module(self, node: fx.Node, source: fx.Node, axis: int) -> bool:
        network, plan, name = self.network, self.plan, str(node.target)
        module = network.get_submodule(name)
        frames = self.values[source.name].shape[axis]
        out = self.values[node.name]
        twin: type[Stream] | None = _CONVS.get(type(module)) or attention_twin(module)
        if twin is None and type(module) in pooling_twins():
            adaptive = "Adaptive" in type(module).__name__
            # To any other number of frames an adaptive pooling divides the clip; to its own it leaves time alone.
            if not adaptive or (isinstance(out, Tensor) and out.shape[axis] == 1):
                twin = pooling_twins()[type(module)]
        if twin is not None:
            module.__class__ = twin  # type: ignore[assignment]  # the same layer, without a state of its own
            if not issubclass(twin, Window):
                prepare_attention(module, frames, self._last_only(node))
            elif "Adaptive" in twin.__name__:
                module.frames = frames  # type: ignore[assignment]
        if not isinstance(module, Stream):
            return False
        if node.kwargs or len(node.args) > 1:
            raise ValueError("it streams with one argument, and it has more; leave masks out")
        if axis != module.axis:
            raise ValueError(f"it has time on axis {module.axis}, but here time is on axis {axis}")
        if name in plan.streams.values():
            raise ValueError(
                "it is called twice, and one layer has one stream; use a copy for the second call"
            )
        if isinstance(module, Window) and module.window() == (1, 1, 0, 0):
            return False  # nothing over time
        return self._use(node, module, name, axis)

    def _last_only(self, node: fx.Node) -> bool:
        """Return whether every user of an encoder reads its last token alone, as `x[:, -1]`."""
        return all(
            getattr(user.target, "__name__", "") == "getitem" and user.args[1] == (slice(None), -1)
            for user in node.users
        )

    def _join(self, node: fx.Node, live: list[fx.Node]) -> None:
        """Crop longer branches as `join` does, each by a stream of its own in front of it."""
        network, plan = self.network, self.plan
        shortest = min(self.values[n.name].shape[2] for n in live)
        for source in live:
            surplus = (self.values[source.name].shape[2] - shortest) // 2
            if surplus:
                name = f"stream_{node.name}_{source.name}"
                with plan.graph.inserting_before(node):
                    crop = plan.graph.call_module(name, (source,))
                node.replace_input_with(source, crop)
                stream = Crop(surplus, surplus).eval()
                network.add_module(name, stream)
                plan.sources[crop.name] = [source.name]
                plan.spans[crop.name] = plan.spans[source.name]
                self._use(crop, stream, name, 2)
        cropped = node.all_input_nodes
        plan.sources[node.name] = [n.name for n in cropped]
        self._span(node, cropped)
        plan.axes[node.name] = 2

    def _frame_axis(self, node: fx.Node, live: list[fx.Node]) -> int:
        """Return the axis of time in what a node gives, having seen that it treats each frame alone."""
        plan = self.plan
        axes = {n.name: plan.axes[n.name] for n in live}
        lengths = {self.values[name].shape[axis] for name, axis in axes.items()}
        out = self.values[node.name]
        refused = ValueError("it mixes the frames of a clip or depends on their number, so it cannot stream")
        if len(lengths) > 1 or not isinstance(out, Tensor):
            raise refused
        (frames,) = lengths
        own = axes[live[0].name]
        candidates = sorted(
            (a for a in range(out.ndim) if out.shape[a] == frames), key=lambda a: (a != own, a)
        )
        for axis in candidates:
            if all(self._alone(node, axes, axis, t) for t in sorted({0, frames // 2, frames - 1})):
                return axis
        raise refused

    def _alone(self, node: fx.Node, axes: dict[str, int | None], axis: int, time: int) -> bool:
        """Return whether a node gives for one frame what it gives for that frame in the clip."""
        frame = {name: self.values[name].narrow(a, time, 1) for name, a in axes.items() if a is not None}
        try:
            got = self.network.call(node, self.values | frame)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False  # its sizes are those of the clip
        wanted = self.values[node.name].narrow(axis, time, 1)
        return got.shape == wanted.shape and torch.allclose(got, wanted, 1e-3, 1e-4)


def continual(model: nn.Module, input_shape: tuple[int, ...], *, axis: int = 2) -> ContinualNetwork:
    """Return a copy of a clip network that also runs frame by frame (`paper <https://arxiv.org/abs/2306.13474>`_).

    A stream gives, output by output, what the network gives for the whole stream as one long clip. A network that
    averages or attends over all of time does so over the last frames, as many as `input_shape` says, and every step
    gives what the network gives for the clip that ends there.

    Zeros that layers pad over time stand at both ends of the stream, and not at both ends of every window: without
    them a window's result is exactly the clip network's, with them it is what the clip network would give if it saw
    the frames around. Recurrent layers, norms over time and whatever else mixes frames are refused.

    Args:
        model: any network that torch.fx can trace; it stays as it is. The copy is in eval mode.
        input_shape: of one clip, for example (3, 16, 112, 112); its length is that of the windows.
        axis: of time in a batch of clips: 2 for (N, C, T, ...), 1 for tokens (N, T, E).

    Raises:
        ValueError: naming the layer that cannot stream, and why.
    """
    if not 1 <= axis <= len(input_shape):
        raise ValueError(f"axis must be one of 1 to {len(input_shape)} for this input_shape: got {axis}")
    root = copy.deepcopy(model).eval()
    try:
        graph = _Tracer().trace(root)
    except Exception as error:  # tracing runs the network's own code, which may fail in any way on a symbol
        raise ValueError(f"{type(model).__name__} cannot be traced by torch.fx: {error}") from None
    tensors = (t for t in itertools.chain(root.parameters(), root.buffers()) if t.is_floating_point())
    tensor = next(tensors, torch.empty(0))
    clip = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    network = ContinualNetwork(root, graph, axis)
    with torch.no_grad():
        _Converter(network, clip.to(tensor.device, tensor.dtype)).convert()
    return network.eval()
