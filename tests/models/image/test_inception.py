"""The Inception networks against the figures and tables of their papers."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.models.factory import create_model, get_variant
from omniconv.models.image.inception import Mixed, pad_to, required_size
from omniconv.models.image.inception_resnet import InceptionResidual
from omniconv.models.image.inception_v3 import InceptionV3Config


def maps_at_299(name, **options):
    model = create_model(name, device="meta", **options)
    maps = model.forward_stages(torch.empty(1, 3, 299, 299, device="meta"))
    return [(fmap.shape[1], fmap.shape[2]) for fmap in maps]


def test_maps_follow_the_papers_tables():
    assert maps_at_299("inception_v3") == [(64, 147), (192, 71), (288, 35), (768, 17), (2048, 8)]
    assert maps_at_299("inception_v4") == [(64, 147), (160, 73), (384, 35), (1024, 17), (1536, 8)]
    # Figures 14 and 15: 35x35x256, 17x17x896, 8x8x1792.
    assert maps_at_299("inception_resnet_v1")[2:] == [(256, 35), (896, 17), (1792, 8)]
    assert maps_at_299("inception_resnet_v2_paper")[2:] == [(384, 35), (1152, 17), (2144, 8)]
    assert maps_at_299("inception_resnet_v2") == [(64, 147), (192, 71), (320, 35), (1088, 17), (1536, 8)]


@pytest.mark.parametrize(
    ("name", "count"),
    [("inception_v3", 23_834_568), ("inception_v4", 42_679_816), ("inception_resnet_v2", 55_843_464)],
)
def test_exact_parameters_of_the_public_weights(name, count):
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == count


def test_auxiliary_head():
    model = create_model("inception_v3", device="meta", aux=True)
    assert sum(p.numel() for p in model.parameters()) == 27_161_264  # torchvision's
    model = create_model("inception_v3_test", num_classes=4, aux=True)
    logits, auxiliary = model(torch.randn(2, 3, 40, 33)), model.forward_with_aux(torch.randn(2, 3, 40, 33))
    assert [y.shape for y in (logits, *auxiliary)] == [(2, 4)] * 3
    model.forward_with_aux(torch.randn(2, 3, 40, 33))[1].sum().backward()
    assert model.get_submodule("AuxLogits.conv0.conv").weight.grad.abs().sum() > 0
    model.reset_classifier(7)
    assert model.forward_with_aux(torch.randn(2, 3, 17, 17))[1].shape == (2, 7)
    assert create_model("inception_v3_test", aux=True, features_only=True)(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="make it with aux=True"):
        create_model("inception_v3_test").forward_with_aux(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["inception_v3_test", "inception_v4_test", "inception_resnet_test"])
@torch.no_grad()
def test_a_deep_stem_takes_small_images_and_leaves_large_ones(name):
    stems = ("v1", "v4", "slim") if "resnet" in name else ("deep",)
    for stem in stems:
        model = create_model(name, num_classes=3, stem=stem).eval()
        assert model.smallest == 75
        for size in ((33, 47), (80, 20)):
            x = torch.randn(1, 3, *size)
            assert model(x).shape == (1, 3)
            # The border is that of an image padded by hand.
            height, width = (max(0, 75 - side) for side in size)
            borders = (width // 2, width - width // 2, height // 2, height - height // 2)
            torch.testing.assert_close(model(F.pad(x, borders)), model(x), rtol=0, atol=0)
        assert model.forward_features(torch.randn(1, 3, 75, 75)).shape[2:] == (1, 1)
        assert model.feature_info.reduction() == [2, 4, 8, 16, 32]


def test_required_size_is_the_smallest_that_leaves_a_pixel():
    windows = ((3, 2), (3, 1), (5, 3))
    size = required_size(*windows)
    for side, left in ((size, 1), (size - 1, 0)):
        for kernel, stride in windows:
            side = (side - kernel) // stride + 1
        assert side == left
    x = torch.randn(1, 2, 5, 9)
    assert pad_to(x, 5) is x
    assert pad_to(x, 8).shape == (1, 2, 8, 9)


def test_a_table_becomes_its_branches():
    block = Mixed(5, {"a": ((8, 1),), "b": ("avg", (4, 3), (12, (1, 7))), "c": ("max",)})
    assert block.out_channels == 8 + 12 + 5
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters() if "conv" in name}
    assert shapes == {
        "a.conv.weight": (8, 5, 1, 1), "b.1.conv.weight": (4, 5, 3, 3), "b.2.conv.weight": (12, 4, 1, 7)
    }  # fmt: skip


def test_residual_blocks_are_relu_of_the_scaled_sum():
    torch.manual_seed(0)
    block = InceptionResidual(6, {"branch0": ((4, 1),), "branch1": ((3, 1), (5, 3))}, 0.3).eval()
    x = torch.randn(2, 6, 5, 7)
    mixed = torch.cat([block.branch0(x), block.branch1(x)], 1)
    wanted = (x + 0.3 * F.conv2d(mixed, block.conv2d.weight, block.conv2d.bias)).relu()
    torch.testing.assert_close(block(x), wanted)
    block.scale = 0.0
    torch.testing.assert_close(block(x), x.relu(), rtol=0, atol=0)


def test_configurations():
    assert get_variant("inception_resnet_v2").config.depths == (10, 20, 9)
    with pytest.raises(ValueError, match="every stage needs a block"):
        InceptionV3Config(inner=())
