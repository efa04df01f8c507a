"""The All-CNN family against the paper's tables."""

import pytest
import torch
from torch import nn

from omniconv.models.factory import create_model

BASE = {
    "a": [(5, 1, 96), "pool", (5, 1, 192), "pool"],
    "b": [(5, 1, 96), (1, 1, 96), "pool", (5, 1, 192), (1, 1, 192), "pool"],
    "c": [(3, 1, 96), (3, 1, 96), "pool", (3, 1, 192), (3, 1, 192), "pool"],
}
TOP = [(3, 1, 192), (1, 1, 192)]
DERIVED = {
    "strided_cnn_c": [(3, 1, 96), (3, 2, 96), (3, 1, 192), (3, 2, 192)],
    "convpool_cnn_c": [(3, 1, 96)] * 3 + ["pool"] + [(3, 1, 192)] * 3 + ["pool"],
    "all_cnn_c": [(3, 1, 96)] * 2 + [(3, 2, 96)] + [(3, 1, 192)] * 2 + [(3, 2, 192)],
    "strided_cnn_a": [(5, 2, 96), (5, 2, 192)],
    "all_cnn_b": [(5, 1, 96), (1, 1, 96), (3, 2, 96), (5, 1, 192), (1, 1, 192), (3, 2, 192)],
}


def table(model: nn.Module) -> list:
    rows = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            rows.append((module.kernel_size[0], module.stride[0], module.out_channels))
        elif isinstance(module, nn.MaxPool2d):
            assert (module.kernel_size, module.stride) == (3, 2)
            rows.append("pool")
    return rows


@pytest.mark.parametrize(
    ("name", "rows"), [*((f"cnn_{base}", rows) for base, rows in BASE.items()), *DERIVED.items()]
)
def test_tables_of_the_paper(name, rows):
    assert table(create_model(name, device="meta")) == rows + TOP


def test_all_cnn_c_has_the_published_parameters():
    model = create_model("all_cnn_c", num_classes=10, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 1_369_738


@pytest.mark.parametrize("name", ["cnn_c", "strided_cnn_c", "convpool_cnn_c", "all_cnn_c"])
def test_the_last_map_of_a_32_pixel_image_has_six(name):
    model = create_model(name, width=4, features_only=True)
    assert [y.shape[2] for y in model(torch.randn(1, 3, 32, 32))] == [16, 8, 6]


def test_averaged_class_maps_are_the_logits():
    torch.manual_seed(0)
    model = create_model("all_cnn_test", num_classes=7).eval()
    features = model.forward_features(x := torch.randn(2, 3, 33, 40))
    classes = torch.einsum("nchw,kc->nkhw", features, model.classifier.weight)
    torch.testing.assert_close(model(x), classes.mean((2, 3)) + model.classifier.bias)
