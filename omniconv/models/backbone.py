"""What every image network offers, under the names that timm's users know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypedDict

from torch import Tensor, nn

from omniconv.layers.conv.reparam import reparameterize

__all__ = ["Backbone", "Feature", "FeatureExtractor", "FeatureInfo", "Variant"]


class Feature(TypedDict):
    """One of a network's feature maps: channels, input pixels per map pixel, and the module that gives it."""

    num_chs: int
    reduction: int
    module: str


class FeatureInfo(list[Feature]):
    """The feature maps of a network, from the finest to the coarsest."""

    def channels(self) -> list[int]:
        """Return the channels of every map."""
        return [feature["num_chs"] for feature in self]

    def reduction(self) -> list[int]:
        """Return the input pixels per map pixel of every map."""
        return [feature["reduction"] for feature in self]


@dataclass(frozen=True)
class Variant:
    """A named network: its family's class and configuration, and the published figures to hold it to.

    Attributes:
        model: the family's class, called as `model(config, num_classes, in_chans)`.
        config: a frozen dataclass, JSON-serialisable.
        params: published parameters with 1000 classes and 3 input channels (CIFAR variants: 10 classes).
        macs: published multiply-adds of one `size` x `size` image.
        size: input resolution in pixels.
        classes: the number of classes that the figures are for.
        deployed: whether the figures are those of `deploy()`, the re-parameterized form.
        source: where the figures were published, when it is not the paper of the family.
    """

    model: "type[Backbone]"
    config: Any
    params: float | None = None
    macs: float | None = None
    size: int = 224
    classes: int = 1000
    deployed: bool = False
    source: str = ""


class Backbone(nn.Module):
    """Base of the image networks.

    A family implements `forward_stages`, `forward_head` and `reset_classifier`, and sets `config`,
    `num_classes`, `num_features` and `feature_info` when it is made.
    """

    config: Any
    num_classes: int
    num_features: int
    feature_info: FeatureInfo

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps that `feature_info` describes, finest first."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, (N, num_features, H, W), that `forward_head` reads."""
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (N, num_classes) of a feature map, or what enters the classifier if `pre_logits`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, C, H, W)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer (`nn.Identity` if the network has no classes)."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier for `num_classes` in place; 0 leaves none."""
        raise NotImplementedError

    def deploy(self) -> Self:
        """Return an eval-mode copy in which re-parameterizable branches are merged."""
        return reparameterize(self)


class FeatureExtractor(nn.Module):
    """A backbone that returns feature maps instead of logits (`create_model(..., features_only=True)`).

    Args:
        backbone: the network; its head is dropped.
        out_indices: which maps of `feature_info` to return; all by default. Negative ones count from the end.
    """

    def __init__(self, backbone: Backbone, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        # Modules stand in the order in which they run. What follows the last map would only be weights without
        # gradients, over which distributed training stumbles.
        names = [name for name, _ in backbone.named_children()]
        last = backbone.feature_info[-1]["module"].partition(".")[0]
        for name in names[names.index(last) + 1 :]:
            delattr(backbone, name)
        self.backbone = backbone
        count = len(backbone.feature_info)
        wanted = range(count) if out_indices is None else out_indices
        for index in wanted:
            if not -count <= index < count:
                raise ValueError(f"out_indices must lie in [-{count}, {count}): got {index}")
        self.out_indices = tuple(index % count for index in wanted)
        self.feature_info = FeatureInfo(backbone.feature_info[index] for index in self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the chosen feature maps of images (N, C, H, W), in the order of `out_indices`."""
        maps = self.backbone.forward_stages(x)
        return [maps[index] for index in self.out_indices]
