"""Networks as chains of steps, so that one can be left after any block and entered before any other."""

from collections.abc import Callable
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor, nn

from omniconv.models.image.convnext import ConvNeXt
from omniconv.models.image.resnet import ResNet
from omniconv.models.image.stages import StageNetwork
from omniconv.models.image.twins import Twins
from omniconv.models.image.vit import VisionTransformer

__all__ = ["Step", "steps"]


class Step(NamedTuple):
    """One link of the chain: images go into the first, logits come from the last.

    Attributes:
        name: dotted name of the block, or what else happens here.
        run: computes the step.
        stage: of a block, counted from 0; None for what is no block.
        axis: of the channels of what `run` returns.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    stage: int | None = None
    axis: int = 1


@singledispatch
def steps(model: nn.Module) -> list[Step]:
    """Return the steps of a network, whose composition is the network.

    Known are vision transformers, Twins, residual networks and all networks of stages (MetaFormers, ConvNeXt, ...). A
    family of your own joins them by `@steps.register`.

    Raises:
        ValueError: if the family is not known.
    """
    raise ValueError(f"the steps of {type(model).__name__} are not known: add them with @steps.register")


@steps.register
def _(model: VisionTransformer) -> list[Step]:
    def join(x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        tokens: list[Tensor] = [token for token in (model.cls_token, model.dist_token) if token is not None]
        if not tokens:
            return x
        prefix = torch.cat(tokens, 1)
        if model.config.prefix_positions and model.pos_embed is not None:
            prefix = prefix + model.pos_embed[:, : model.prefix_tokens]
        return torch.cat([prefix.expand(len(x), -1, -1), x], 1)

    chain = [Step("embed", lambda x: model.embed(x)[1], axis=-1)]
    for index, block in enumerate(model.blocks):
        if index == model.join:
            chain.append(Step("join", join, axis=-1))
        chain.append(Step(f"blocks.{index}", block, 0, -1))
    return [*chain, Step("head", lambda x: model.forward_head(model.norm(x).transpose(1, 2)))]


@steps.register
def _(model: Twins) -> list[Step]:
    chain: list[Step] = []
    parts = zip(model.patch_embeds, model.blocks, model.pos_block, model.maps, strict=True)
    for stage, (embed, blocks, position, keep) in enumerate(parts):
        chain.append(Step(f"patch_embeds.{stage}", embed, axis=-1))
        for index, block in enumerate(blocks.children()):
            run = nn.Sequential(block, position) if index == 0 else block
            chain.append(Step(f"blocks.{stage}.{index}", run, stage, -1))
        chain.append(Step(f"maps.{stage}", lambda x, keep=keep: keep(x.permute(0, 3, 1, 2))))

    def head(x: Tensor) -> Tensor:
        return model.forward_head(model.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    return [*chain, Step("head", head)]


@steps.register
def _(model: ResNet) -> list[Step]:
    if model.config.gate == "pkcam":
        raise ValueError(
            "blocks with the pkcam gate recall earlier stages and are no chain: use another gate"
        )
    chain = [Step("stem", lambda x: model.maxpool(model.act1(model.bn1(model.conv1(x)))))]
    for stage, name in enumerate(model.stage_names):
        chain += [
            Step(f"{name}.{child}", block, stage)
            for child, block in model.get_submodule(name).named_children()
        ]
    return [*chain, Step("head", model.forward_head)]


@steps.register
def _(model: StageNetwork | ConvNeXt) -> list[Step]:
    chain = [Step("stem", model.stem)]
    for stage, parts in enumerate(model.stages):
        for part, module in parts.named_children():
            if part == "blocks":
                chain += [
                    Step(f"stages.{stage}.blocks.{child}", block, stage)
                    for child, block in module.named_children()
                ]
            else:
                chain.append(Step(f"stages.{stage}.{part}", module))
    norm = model.norm_pre if isinstance(model, ConvNeXt) else nn.Identity()
    return [*chain, Step("head", lambda x: model.forward_head(norm(x)))]
