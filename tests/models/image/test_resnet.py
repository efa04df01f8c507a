"""Gates, norms, stems and subsampling of residual networks are configurations."""

import re

import pytest
import torch
from torch import nn

from omniconv.layers.attention.pkcam import PKCAM
from omniconv.layers.attention.scse import SCSE
from omniconv.layers.conv.spd import SPDConv2d
from omniconv.layers.norm.evonorm import EvoNormB0, EvoNormS0
from omniconv.layers.norm.ibn import IBN
from omniconv.layers.pool.blur import BlurPool2d
from omniconv.models.factory import create_model

SMALL = {"num_classes": 3, "depths": (2, 2), "widths": (16, 32)}


def names(model, kind):
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"gate": "scse"}, SCSE, ["layer1.0.se", "layer1.1.se", "layer2.0.se", "layer2.1.se"]),
        ({"gate": "pkcam"}, PKCAM, ["layer1.0.se", "layer2.0.se"]),
        ({"ibn": "a"}, IBN, ["layer1.0.bn1", "layer1.1.bn1"]),
        ({"ibn": "b"}, nn.GroupNorm, ["bn1", "layer1.1.IN"]),
        ({"stem": "spd"}, SPDConv2d, ["conv1", "maxpool.0"]),
        ({"anti_alias": "blur"}, BlurPool2d, ["maxpool.1", "layer2.0.aa"]),
    ],
)
def test_a_part_stands_where_its_paper_puts_it(options, kind, expected):
    model = create_model("resnet50", **SMALL, **options)
    assert names(model, kind) == expected
    scores = model(torch.randn(2, 3, 33, 47))
    assert scores.shape == (2, 3)
    scores.sum().backward()


@pytest.mark.parametrize(("norm", "kind"), [("evonorm_s0", EvoNormS0), ("evonorm_b0", EvoNormB0)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50d"])
def test_evonorms_are_their_own_activation(name, norm, kind):
    model = create_model(name, **{**SMALL, "widths": (32, 64)}, norm=norm)
    norms = {key: model.get_submodule(key) for key in names(model, kind)}
    # Nothing but the ends of residual branches and shortcuts goes without an activation.
    bare = {key for key, module in norms.items() if not module.act}
    last = "bn2" if name == "resnet18" else "bn3"
    assert bare == {key for key in norms if key.endswith(last) or "downsample" in key}
    assert names(model, nn.ReLU) == [f"layer{s}.{b}.act" for s in (1, 2) for b in (0, 1)]
    assert not names(model, nn.BatchNorm2d)
    assert model(torch.randn(2, 3, 33, 47)).shape == (2, 3)


def test_a_shifted_image_moves_the_features_less_with_blur():
    torch.manual_seed(0)
    plain, blurred = (
        create_model("resnet18", depths=(1, 1, 1), widths=(8, 16, 32), anti_alias=aa).eval()
        for aa in (None, "blur")
    )
    blurred.load_state_dict(plain.state_dict())
    x = torch.rand(4, 3, 64, 64)

    def change(model):
        maps = (model.forward_features(image)[..., 1:-1, 1:-1] for image in (x, x.roll((1, 1), (2, 3))))
        a, b = maps
        return ((a - b).norm() / a.norm()).item()

    assert change(blurred) < 0.9 * change(plain)


def test_gates_of_pkcam_read_the_stem_and_the_last_block_of_every_earlier_stage():
    model = create_model("resnet18", **SMALL, stem="3x3", gate="pkcam").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # residual branches start at zero; here they must count
    seen, ends = [], []
    model.layer2[0].se.register_forward_hook(lambda m, inputs, y: seen.extend(inputs[1:]))
    model.maxpool.register_forward_hook(lambda m, i, y: ends.append(y.mean((2, 3))))
    model.layer1[1].bn2.register_forward_hook(lambda m, i, y: ends.append(y.mean((2, 3))))
    model(torch.randn(2, 3, 40, 40))
    assert len(seen) == 2
    for read, pooled in zip(seen, ends, strict=True):
        torch.testing.assert_close(read, pooled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "cbam"}, "gate must be one of se, eca, scse, pkcam: got 'cbam'"),
        ({"norm": "layer"}, "norm must be one of batch, group, evonorm_b0, evonorm_s0: got 'layer'"),
        ({"stem": "5x5"}, "stem must be one of 7x7, deep, tiered, rs, spd, 3x3: got '5x5'"),
        ({"ibn": "a", "norm": "group"}, "ibn needs norm='batch': got 'group'"),
        ({"widths": (8,)}, "depths and widths must be equally long: got (3, 4, 6, 3) and (8,)"),
    ],
)
def test_unknown_parts_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model("resnet50", device="meta", **options)
