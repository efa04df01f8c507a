"""Against Pillow's antialiased resize, closed forms, and ONNX Runtime."""

import numpy as np
import pytest
import torch
from PIL import Image

from omniconv.data.preprocess import Preprocess, resize


def test_normalises_without_resizing():
    x = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    module = Preprocess((5, 7), [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(module(x), (x / 255 - mean) / std, rtol=1e-6, atol=1e-6)


def test_range():
    module = Preprocess(1, [0.0], [1.0], low=-2, high=6)
    assert module(torch.tensor([[[[-2.0]]], [[[6.0]]], [[[0.0]]]])).flatten().tolist() == [0, 1, 0.25]


@pytest.mark.parametrize("size", [(8, 11), (40, 30)])
def test_resize_is_pillows(size):
    array = np.random.default_rng(0).random((25, 19), np.float32)
    expected = np.asarray(Image.fromarray(array).resize(size[::-1], Image.Resampling.BILINEAR))
    actual = resize(torch.from_numpy(array.copy())[None, None], size)[0, 0]
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5)


def test_resize_to_the_same_size_changes_nothing():
    x = torch.rand(2, 3, 9, 7)
    assert resize(x, (9, 7)).equal(x)


def test_round_trip_and_state():
    module = Preprocess((4, 6), [0.1, 0.2], [0.3, 0.4], low=-1, high=5)
    values = module.to_dict()
    assert values == {"size": [4, 6], "mean": [0.1, 0.2], "std": [0.3, 0.4], "low": -1.0, "high": 5.0}
    other = Preprocess.from_dict(values)
    x = torch.rand(1, 2, 9, 9)
    assert other(x).equal(module(x))
    assert module.state_dict() == {}


@pytest.mark.parametrize(
    "sample", [torch.randint(0, 256, (2, 3, 33, 47), dtype=torch.uint8), torch.rand(2, 3, 33, 47)]
)
def test_export_with_dynamic_sizes(sample, tmp_path):
    module = Preprocess(16, [0.4] * 3, [0.2] * 3, high=255 if sample.dtype == torch.uint8 else 1).eval()
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(module, (sample,), dynamic_shapes=dynamic)
    for shape in ((1, 3, 20, 60), (5, 3, 16, 16), (2, 3, 8, 9)):
        x = (
            torch.rand(shape)
            if sample.dtype != torch.uint8
            else torch.randint(0, 256, shape, dtype=torch.uint8)
        )
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_with_dynamic_sizes(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = Preprocess(16, [0.4] * 3, [0.2] * 3).eval()
    sample = torch.randint(0, 256, (2, 3, 33, 47), dtype=torch.uint8)
    dynamic = {"x": {0: "n", 2: "h", 3: "w"}}
    torch.onnx.export(module, (sample,), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=dynamic)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 20, 60), (5, 3, 16, 16), (2, 3, 8, 9)):
        x = torch.randint(0, 256, shape, dtype=torch.uint8)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(y, module(x).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be positive: got 0 x 0"),
        ({"mean": [0.0, 1.0]}, "mean and std must have one value a channel: got 2 and 1"),
        ({"std": [0.0]}, "std must be positive: got 0.0"),
        ({"low": 3, "high": 3}, "high must be above low: got 3 and 3"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**{"size": 4, "mean": [0.0], "std": [1.0], **arguments})
