import pytest

from omniconv.papers.sources import ROOT, fingerprint, locate, summary_of, usage_of


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("omniconv.layers.attention.se.SqueezeExcite", "layers/attention/se.py"),
        ("omniconv.layers.attention.se.SqueezeExcite.forward", "layers/attention/se.py"),
        ("omniconv.layers.attention.eca.eca_kernel_size", "layers/attention/eca.py"),
        ("omniconv.layers.attention.se.CASES", "layers/attention/se.py"),
        ("omniconv.layers.attention.se", "layers/attention/se.py"),
        ("omniconv.layers.attention", "layers/attention/__init__.py"),
        ("omniconv.create_model", None),  # only imported there
        ("omniconv.layers.attention.se.Tensor", None),
        ("omniconv.layers.attention.se.Squeeze", None),
        ("omniconv.layers.attention.se.SqueezeExcite.nothing", None),
        ("omniconv.layers.nothing.Nothing", None),
        ("torch.nn.Conv2d", None),
    ],
)
def test_a_name_is_found_where_it_is_defined(name, file):
    found = locate(name)
    assert (found and found.relative_to(ROOT).as_posix()) == file


def test_the_fingerprint_names_each_file_once_and_leaves_out_what_is_missing():
    names = [
        "omniconv.layers.attention.eca.EfficientChannelAttention",
        "omniconv.layers.attention.eca.eca_kernel_size",
        "omniconv.layers.nothing.Nothing",
    ]
    prints = fingerprint("no_such_check", names)
    assert list(prints) == ["layers/attention/eca.py"]
    assert prints == fingerprint("", names[:1])
    assert len(prints["layers/attention/eca.py"]) == 16


def test_usage_shows_a_model_by_name_and_a_layer_by_its_signature():
    usage = usage_of("omniconv.models.image.resnet.ResNet")
    assert usage == 'import omniconv\n\nmodel = omniconv.create_model("resnet10t", num_classes=10)'
    usage = usage_of("omniconv.layers.attention.eca.EfficientChannelAttention")
    assert usage.splitlines()[0] == "from omniconv.layers.attention.eca import EfficientChannelAttention"
    assert usage.splitlines()[2].startswith(
        "# EfficientChannelAttention(channels: int, kernel_size: int | None"
    )
    assert "self" not in usage
    usage = usage_of("omniconv.layers.attention.eca.eca_kernel_size")
    assert usage.endswith("# eca_kernel_size(channels: int, gamma: float=2.0, b: float=1.0)")
    assert usage_of("omniconv.layers.attention.eca.nothing") == ""


def test_the_summary_is_the_docstring_without_markup():
    text = summary_of("omniconv.layers.attention.eca.EfficientChannelAttention")
    assert text == "Channel gate of ECA-Net."
    assert summary_of("omniconv.nothing.at.all") == ""
