"""The steps of every family make up the network."""

import pytest
import torch
from torch import nn

from omniconv.compress.adaptive.steps import steps
from omniconv.models.factory import create_model

NAMES = (
    "vit_test", "deit_test", "convit_test", "twins_test", "resnet_test", "resnext_test", "convnext_test",
    "poolformer_test", "caformer_test", "hornet_test", "inception_next_test",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_composition_of_the_steps_is_the_network_bit_for_bit(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5).eval()
    x = torch.randn(2, 3, 40, 56)
    wanted = model(x)
    chain = steps(model)
    for step in chain:
        x = step.run(x)
        if step.stage is not None:
            assert isinstance(model.get_submodule(step.name), nn.Module)
    assert torch.equal(x, wanted)
    stages = [step.stage for step in chain if step.stage is not None]
    assert stages == sorted(stages)


def test_unknown_families_are_named():
    with pytest.raises(ValueError, match="the steps of Linear are not known"):
        steps(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pkcam gate recall"):
        steps(create_model("resnet_pkcam_test"))
