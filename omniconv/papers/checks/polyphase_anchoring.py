"""With polyphase anchoring, transformers answer the same wherever an image is shifted to, and patches, windows and keys
that stand on a fixed grid do not; anchoring itself has no parameters.

Shifts are circular. The small networks learn from Fashion-MNIST with zeros around it, 32 x 32 pixels.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.models.backbone import Backbone
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

LOGIT_ERROR = 1e-6
DIFFERENCE = 1e-2
IMAGES = 200
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_test", {"patch_size": 4, "img_size": 32, "dim": 32, "depth": 2}),
    "Twins": ("twins_test", {"window": 4}),
}


def make_network(name: str, *, anchored: bool, channels: int = 1) -> Backbone:
    """Return a small network."""
    model, options = NETWORKS[name]
    torch.manual_seed(derive(0, "weights"))
    return create_model(
        model, num_classes=10, in_chans=channels, anchored=anchored, drop_path_rate=0.0, **options
    )


def roll(x: Tensor, shift: tuple[int, int]) -> Tensor:
    """Return the images, shifted circularly."""
    return torch.roll(x, shift, (2, 3))


def telling(model: nn.Module) -> nn.Module:
    """Return the network in float64 with weights large enough for answers to differ."""
    model = model.double().eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 or "bias" in name else 1.0, 0.2)
    return model


@torch.no_grad()
def shifted(name: str, *, anchored: bool) -> tuple[float, float]:
    """Return how much all shifts of two random images by up to 8 pixels change logits, and the last map but for a roll.

    Both relative to the largest value.
    """
    model = telling(make_network(name, anchored=anchored, channels=3))
    assert isinstance(model, Backbone)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits, maps = model(x), model.forward_stages(x)[-1]
    places = list(itertools.product(range(maps.shape[2]), range(maps.shape[3])))
    rolled = torch.stack([roll(maps, place) for place in places])
    change, moved = 0.0, 0.0
    for shift in itertools.product(range(8), range(8)):
        images = roll(x, shift)
        change = max(change, float((model(images) - logits).abs().max()))
        apart = (rolled - model.forward_stages(images)[-1]).abs().amax((2, 3, 4))
        moved = max(moved, float(apart.amin(0).max()))
    return change / float(logits.abs().max()), moved / float(maps.abs().max())


@torch.no_grad()
def consistency(model: nn.Module, images: Tensor) -> float:
    """Return the share of images in percent whose class a random shift leaves as it is."""
    random = generator(0, "shifts")
    model.eval()
    steps = torch.randint(0, 32, (len(images), 2, 2), generator=random).tolist()
    first, second = (
        torch.cat([roll(image[None], tuple(step[k])) for image, step in zip(images, steps, strict=True)])
        for k in range(2)
    )
    return 100 * float((model(first).argmax(1) == model(second).argmax(1)).float().mean())


def run(check: Check) -> None:
    """Measure shifts of random and of trained networks, and count parameters."""
    for name in NETWORKS:
        change, moved = shifted(name, anchored=True)
        check.require(f"change of {name}'s logits under 64 shifts, anchored", change, "<=", LOGIT_ERROR)
        check.require(f"change of {name}'s last map, but for a roll, anchored", moved, "<=", LOGIT_ERROR)
        change, moved = shifted(name, anchored=False)
        check.require(f"change of {name}'s logits, not anchored", change, ">", DIFFERENCE)
        check.require(f"change of {name}'s last map, not anchored", moved, ">", DIFFERENCE)
    for name in ("twins_svt_small", "twins_pcpvt_small"):
        plain, anchored = (
            sum(p.numel() for p in create_model(name, device="meta", anchored=on).parameters())
            for on in (False, True)
        )
        check.require(f"parameters that anchoring adds to {name}", anchored - plain, "==", 0)

    data, test = ((F.pad(x, (2, 2, 2, 2), value=float(x.min())), y) for x, y in fashion_mnist(2560, 2000))
    for name in NETWORKS:
        found = {}
        for anchored in (True, False):
            model = make_network(name, anchored=anchored)
            train(model, data, epochs=4, batch=64, shift=0)
            found[anchored] = consistency(model, test[0][:IMAGES])
            check.note(f"{name}, anchored {anchored}: accuracy {accuracy(model, test):.1f} without shifts")
        check.require(
            f"images whose class no shift changes, {name} trained with anchoring", found[True], "==", 100,
            baseline=found[False], unit="%",
        )  # fmt: skip
        check.require(f"the same without anchoring, {name}", found[False], "<", 100, unit="%")
