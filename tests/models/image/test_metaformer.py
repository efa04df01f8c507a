"""The skeleton of staged networks and the first MetaFormers; timm's own are compared in test_timm_parity."""

import pytest
import torch
from torch import nn

from omniconv.models.factory import create_model
from omniconv.models.image.metaformer import MetaFormerConfig
from omniconv.models.image.stages import MetaFormerBlock, MetaNeXtBlock


def _double(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter)
    return module


def test_a_block_has_two_residual_branches_with_scales_on_both_sides():
    mixer, mlp = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
    block = _double(MetaFormerBlock(6, mixer, mlp, nn.BatchNorm2d, layer_scale=0.1, res_scale=1.0)).eval()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    scales = [
        getattr(block, name).scale[:, None, None]
        for name in ("res_scale1", "layer_scale1", "res_scale2", "layer_scale2")
    ]
    y = scales[0] * x + scales[1] * mixer(block.norm1(x))
    y = scales[2] * y + scales[3] * mlp(block.norm2(y))
    torch.testing.assert_close(block(x), y)


def test_a_metanext_block_has_one_residual_branch():
    mixer, mlp = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
    block = _double(MetaNeXtBlock(6, mixer, mlp, layer_scale=0.1)).eval()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    y = x + block.gamma[:, None, None] * mlp(block.norm(mixer(x)))
    torch.testing.assert_close(block(x), y)


def test_stochastic_depth_rises_to_its_rate_over_all_blocks():
    model = create_model("poolformer_s12", drop_path_rate=0.11, device="meta")
    rates = [module.drop_path.p for module in model.modules() if isinstance(module, MetaFormerBlock)]
    assert rates == pytest.approx([0.01 * index for index in range(12)])


def test_pooling_sees_neighbours_inside_the_map_alone():
    mixer = create_model("poolformer_test").stages[0].blocks[0].token_mixer
    x = torch.arange(12.0).view(1, 1, 3, 4)
    # The corner's mean is over 0, 1, 4 and 5, the middle's over nine.
    torch.testing.assert_close(mixer(x)[0, 0, 0, 0], torch.tensor((0 + 1 + 4 + 5) / 4))
    torch.testing.assert_close(mixer(x)[0, 0, 1, 1], torch.tensor(0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 2)}, "depths and widths must be equally long"),
        ({"mixers": ("pool",)}, "depths and mixers must be equally long"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MetaFormerConfig(**options)
