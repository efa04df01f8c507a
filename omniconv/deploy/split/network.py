"""A network in two halves with a bottleneck between them: the device's half ends in bytes, the server's begins there.

`split(model, "layer1", bottleneck, example)` cuts any module at a place through which everything flows, puts a
bottleneck (`EntropicBottleneck`, `QuantizedBottleneck`) in place of what lies there and returns a student; `distill`
trains it, and `wire` runs its halves on two machines.
"""

import copy
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, fx, nn

from omniconv.design.cost import count_cost

__all__ = ["Codec", "Parts", "SplitNetwork", "SplitReport", "cut", "split"]

_HEADER = struct.Struct("!HH")  # rows and columns of the latent, in front of every image's message


class Codec(Protocol):
    """What turns a latent into bytes; an `nn.Module`."""

    def quantise(self, y: Tensor) -> Tensor:
        """Return the latent as the receiver will see it, or something with a gradient in training."""
        ...

    def compress(self, y: Tensor) -> list[bytes]:
        """Return the bytes of each sample of `y` (N, C, H, W)."""
        ...

    def decompress(self, messages: list[bytes], shape: tuple[int, ...]) -> Tensor:
        """Return the latent (N, C, *shape) of messages of `compress`."""
        ...


class Parts(NamedTuple):
    """A bottleneck's modules.

    Attributes:
        encoder: to the latent, on the device.
        codec: a `Codec`.
        decoder: from the latent to the output of the layer that is replaced, on the server.
        reads_image: whether the encoder takes the image instead of the replaced layer's input.
    """

    encoder: nn.Module
    codec: nn.Module
    decoder: nn.Module
    reads_image: bool


@dataclass(frozen=True)
class SplitReport:
    """What a split costs on both sides.

    Attributes:
        device_parameters: of the half that runs on the device.
        device_macs: its multiply-adds for one image.
        server_parameters: of the other half.
        server_macs: its multiply-adds for one image.
        image_bytes: of one image, eight bits a value.
        sent_bytes: of one image's message, header included, on average.
    """

    device_parameters: int
    device_macs: int
    server_parameters: int
    server_macs: int
    image_bytes: int
    sent_bytes: float

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as a plain dict."""
        return asdict(self)


class SplitNetwork(nn.Module):
    """A network whose first half ends in bytes.

    Called as a module it computes both halves in one place, quantised as over the wire (in training as its codec
    trains). Several servers may hold other decoders and tails for the same encoder: make a network of each.

    Args:
        stem: layers of the original network that stay on the device.
        encoder: from the stem's output to the latent.
        codec: between latent and bytes.
        decoder: from the latent to what `tail` takes.
        tail: the rest of the original network.
    """

    def __init__(
        self, stem: nn.Module, encoder: nn.Module, codec: nn.Module, decoder: nn.Module, tail: nn.Module
    ) -> None:
        super().__init__()
        self.stem, self.encoder, self.codec = stem, encoder, codec
        self.decoder, self.tail = decoder, tail

    @property
    def _codec(self) -> Codec:
        return cast(Codec, self.codec)

    def forward(self, x: Tensor) -> Any:
        """Return what the tail makes of images (N, C, H, W)."""
        return self.tail(self.decoder(self._codec.quantise(self.encoder(self.stem(x)))))

    def encode(self, x: Tensor) -> list[bytes]:
        """Return the message of each image (N, C, H, W), as the device sends it."""
        with torch.no_grad():
            return self.messages(self.stem(x))

    @torch.no_grad()
    def messages(self, early: Tensor) -> list[bytes]:
        """Return the message of each sample of the stem's output.

        Raises:
            ValueError: if a side of the latent exceeds 65,535.
        """
        y = self.encoder(early)
        if max(y.shape[2:]) > 0xFFFF:
            raise ValueError(f"a latent may have 65535 rows and columns: got {tuple(y.shape[2:])}")
        return [_HEADER.pack(*y.shape[2:]) + message for message in self._codec.compress(y)]

    @torch.no_grad()
    def decode(self, message: bytes, max_pixels: int = 1 << 20) -> Any:
        """Return the server's result for one message.

        Args:
            message: of `encode`.
            max_pixels: largest latent that is decoded; memory is taken only after its size has been checked.

        Raises:
            ValueError: if the message is no latent of at most so many pixels.
        """
        if len(message) < _HEADER.size:
            raise ValueError(f"a message has at least {_HEADER.size} bytes: got {len(message)}")
        shape = _HEADER.unpack_from(message)
        if not 0 < shape[0] * shape[1] <= max_pixels:
            raise ValueError(f"a latent must have 1 to {max_pixels} pixels: got {shape[0]} x {shape[1]}")
        return self.tail(self.decoder(self._codec.decompress([message[_HEADER.size :]], shape)))

    def report(self, images: Tensor) -> SplitReport:
        """Measure what images (N, C, H, W) cost."""
        device = nn.Sequential(self.stem, self.encoder)
        server = nn.Sequential(self.decoder, self.tail)
        shape = tuple(images.shape[1:])
        with torch.no_grad():
            latent = tuple(self.encoder(self.stem(images[:1])).shape[1:])
        first, second = count_cost(device, shape), count_cost(server, latent)
        sent = [len(message) for message in self.encode(images)]
        return SplitReport(
            first.parameters, first.macs, second.parameters, second.macs, images[0].numel(), sum(sent) / len(sent)
        )  # fmt: skip


class _Tracer(fx.Tracer):
    """Looks into the modules that hold the cut, and at all others from outside."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self.at.startswith(f"{module_qualified_name}.")


def _between(model: nn.Module, at: str, start: fx.Node, end: Any) -> fx.GraphModule:
    """Return the part of a traced graph that leads from the node `start` to `end`."""
    graph = fx.Graph()
    copies = {start: graph.placeholder("x")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node.op == "placeholder":
                raise ValueError(
                    f"{at} does not cut the network: what follows also reads the image or an earlier feature; "
                    "cut where everything flows through one layer"
                )
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    graph.output(fx.map_arg(end, copied))
    return fx.GraphModule(model, graph)


def cut(model: nn.Module, at: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return what comes before the layer `at`, the layer, and what comes after it, on the same weights.

    Args:
        model: any module with one input whose modules around `at` torch.fx can trace; in eval mode.
        at: name of a layer with one input, called once, through which everything flows.

    Raises:
        ValueError: if there is no such layer, or if something flows around it.
    """
    if at not in dict(model.named_modules()) or not at:
        raise ValueError(
            f"the network has no layer {at!r}; its layers: {', '.join(dict(model.named_children()))}"
        )
    try:
        graph = _Tracer(at).trace(model)
    except Exception as error:
        raise ValueError(
            f"the network around {at} could not be traced ({error}); cut at another layer"
        ) from error
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == at]
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    if len(calls) != 1 or len(calls[0].all_input_nodes) != 1 or len(inputs) != 1:
        raise ValueError(f"{at} must be called once, with one input, in a network of one input")
    (output,) = (node for node in graph.nodes if node.op == "output")
    before = _between(model, at, inputs[0], calls[0].all_input_nodes[0])
    return before, model.get_submodule(at), _between(model, at, calls[0], output.args[0])


def split(
    model: nn.Module, at: str, bottleneck: Callable[[Tensor, Tensor, Tensor], Parts], example: Tensor
) -> SplitNetwork:
    """Return a student that computes as `model`, with a bottleneck in place of the layer `at`.

    The bottleneck is new: train it with `distill_head` before use.

    Args:
        model: the teacher; the student gets copies of its layers.
        at: name of the layer to replace, such as "layer1" or "stages.0".
        bottleneck: makes the parts from an image, the layer's input and its output.
        example: images (N, C, H, W) from which the layer's sizes are learned.

    Raises:
        ValueError: if `at` is no layer, or if something flows around it.
    """
    before, layer, after = cut(copy.deepcopy(model).eval(), at)
    with torch.no_grad():
        early = before(example)
        target = layer(early)
    if not isinstance(target, Tensor) or target.ndim != 4:
        raise ValueError(f"{at} must give maps (N, C, H, W) to be split there")
    parts = bottleneck(example, early, target)
    stem = nn.Identity() if parts.reads_image else before
    student = SplitNetwork(stem, parts.encoder, parts.codec, parts.decoder, after)
    return student.to(example.device).eval()
