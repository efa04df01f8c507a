"""The two files that reproduce a run: what was asked (`config.yaml`) and what was decided (`plan.yaml`)."""

from typing import Any, Literal

from pydantic import Field

from omniconv.core.config import Config
from omniconv.data.augment import AugmentConfig

__all__ = ["FitConfig", "Plan"]


class FitConfig(Config):
    """What the user asked for; `None` leaves the choice to the plan.

    Attributes:
        data: folder, file, or "digits".
        labels: table of labels for a folder of pictures.
        task: "classification", "multilabel" or "regression"; guessed from the labels by default.
        target: label column or columns of the table.
        group: column whose groups must not be split between train, val and test.
        model: network by name.
        pretrained: weights to start from: a file, or `hub:OWNER/NAME`.
        trust: load these weights although they may run code.
        plan: path of a plan to follow instead of making one.
        epochs: passes over the training pictures.
        seconds: training time.
        latency: seconds for one picture, measured on the exported network.
        bytes: size of the exported network.
        seed: of splits, weights, order and augmentation.
        skip_bad: go on when more than 1% of the pictures are unreadable.
        export: formats to write.
        workers: threads that decode pictures.
    """

    data: str
    labels: str | None = None
    task: Literal["classification", "multilabel", "regression"] | None = None
    target: str | list[str] | None = None
    group: str | None = None
    model: str | None = None
    pretrained: str | None = None
    trust: bool = False
    plan: str | None = None
    epochs: int | None = Field(default=None, ge=1)
    seconds: float | None = Field(default=None, gt=0)
    latency: float | None = Field(default=None, gt=0)
    bytes: int | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    skip_bad: bool = False
    export: tuple[str, ...] = ("torch", "onnx")
    workers: int = Field(default=2, ge=0)


class Plan(Config):
    """How the network is trained; every value may be edited and given back with `--plan`.

    Attributes:
        network: name of the network, as in `omniconv models`.
        options: fields of the network's configuration that differ from the named variant.
        size: height and width in pixels to which pictures are resized.
        batch: pictures a step.
        accumulate: parts into which a batch is split to save memory.
        epochs: passes over the training pictures.
        precision: "float32", or "bfloat16" for convolutions and matrix products.
        channels_last: memory format of the network, where torch computes its gradients rightly in it.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
        lr: peak learning rate.
        weight_decay: on weights of convolutions and linear layers; norms and biases take none.
        warmup: share of the steps over which the learning rate rises.
        ema: decay a step of the averaged weights that are evaluated and kept; 0 for none.
        smoothing: label smoothing.
        clip: largest norm of the gradient.
        patience: epochs without a better validation result after which training ends early; 0 for never.
        augment: what is done to training pictures.
        seconds: training time after which epochs are cut; None for no limit.
        reasons: why it was planned this way, for people.
    """

    network: str
    options: dict[str, Any] = Field(default_factory=dict)
    size: int = Field(ge=4)
    batch: int = Field(ge=1)
    accumulate: int = Field(default=1, ge=1)
    epochs: int = Field(ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = True
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    ema: float = Field(default=0.998, ge=0, lt=1)
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    clip: float = Field(default=5.0, gt=0)
    patience: int = Field(default=0, ge=0)
    augment: AugmentConfig = AugmentConfig()
    seconds: float | None = None
    reasons: tuple[str, ...] = ()
