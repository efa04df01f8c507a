"""timm as an independent truth: importing it, filling networks with telling weights, comparing maps."""

import contextlib
import functools
import importlib.util
import io
import math
import sys
import warnings
import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from omniconv.layers.drop_path import DropPath

__all__ = [
    "calibrate",
    "fill",
    "gap",
    "images_for",
    "import_timm",
    "input_gradient",
    "load_renamed",
    "no_dropout",
    "without_init",
]

_libraries: list[torch.library.Library] = []


def images_for(name: str) -> Tensor:
    """Return two images that timm's network of this name takes, as small as it lets them be."""
    timm = import_timm()
    assert timm is not None
    config = timm.get_pretrained_cfg(name)
    size = (64, 96)
    if config is not None and config.fixed_input_size:
        size = config.input_size[1:]
    elif "halonet" in name:  # whole blocks of eight pixels, in the last stage too
        size = (256, 256)
    elif name.startswith(("inception_v", "inception_resnet")):  # unpadded: of less than 75 nothing is left
        size = (76, 108)
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def input_gradient(model: nn.Module, images: Tensor) -> Tensor:
    """Return the gradient of a weighted sum of the logits by the images."""
    with torch.enable_grad():
        images = images.clone().requires_grad_()
        logits = model(images)
        probe = torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype)
        return torch.autograd.grad((logits * probe).sum(), images)[0]


def _torchvision_works() -> bool:
    spec = importlib.util.find_spec("torchvision._C")
    if spec is None or spec.origin is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError:
        return False
    return True


@functools.cache
def import_timm() -> ModuleType | None:
    """Return timm, or None where it is not installed.

    timm imports torchvision, whose wheels load only beside the torch build that they were made for. Without
    its compiled part, torchvision's Python part still imports once the operators that it decorates exist.
    """
    if importlib.util.find_spec("timm") is None:
        return None
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        if "torchvision" not in sys.modules and not hasattr(torch.ops.torchvision, "nms"):
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)  # the operators last as long as the library
        import timm

    return timm


class _SkipInit(TorchFunctionMode):
    """Leaves parameters as they were allocated; buffers are computed as ever."""

    skipped = frozenset(
        getattr(Tensor, name)
        for name in ("normal_", "uniform_", "erfinv_", "clamp_", "mul_", "add_", "fill_", "zero_", "div_")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.skipped and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_init() -> Iterator[None]:
    """Make networks without the time that drawing their weights takes; `fill` them afterwards."""
    with _SkipInit(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def _noise() -> Tensor:
    return torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))


def fill(model: nn.Module) -> None:
    """Overwrite every parameter and running statistic with values under which all of them matter.

    Kernels keep the variance of what passes (2 / fan-in); scales lie in 0.5 to 1, also those that training
    starts at zero or 1e-6; shifts and running means are about 0.1; `calibrate` then sets running statistics
    from images. Noise is cut from one long vector at a place that depends on the name, since drawing 100
    million numbers would take longer than the comparison.
    """
    noise = _noise()

    def cut(name: str, count: int) -> Tensor:
        start = zlib.crc32(name.encode()) % len(noise)
        return torch.cat([noise[start:], noise.repeat(count // len(noise) + 1)])[:count]

    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            random = cut(name, value.numel()).view(value.shape)
            if "running_var" in name:
                value.copy_(random.abs().clamp(max=2).mul(0.5).add(0.5))
            elif value.ndim > 1 and sum(size > 1 for size in value.shape) > 1:
                value.copy_(random.mul_(math.sqrt(2 / max(1, value[0].numel()))))
            elif "bias" in name or "beta" in name or "mean" in name:
                value.copy_(random.mul(0.1))
            else:
                value.copy_(random.abs().clamp(max=2).mul(0.25).add(0.5))


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Set the running statistics to those of `images`, so that no layer drowns or fades what came before it."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.running_var is not None:
            norm.running_var.clamp_(min=0.05)


def no_dropout(model: nn.Module) -> None:
    """Switch off everything random in train mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | DropPath):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):
            vars(module)["drop_prob"] = 0.0


def load_renamed(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the part of a whole network's state that timm's feature extractor keeps under changed names."""
    plain = {name.replace(".", "_"): value for name, value in state.items()}
    own = model.state_dict()
    found = {name: plain[name.replace(".", "_").removeprefix("model_").removeprefix("body_")] for name in own}
    model.load_state_dict(found)


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value; refuse what cannot tell faults."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    assert theirs.isfinite().all(), "the reference is not finite"
    spread = theirs.float().std().item()
    assert spread > 1e-3 * theirs.abs().max().item() > 0, "the reference is constant and hides faults"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
