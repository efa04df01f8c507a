"""The repository says of the network what ONNX Runtime says of it."""

import re

import onnxruntime
import pytest
import torch
from torch import nn

from omniconv.core.errors import DataError, UsageError
from omniconv.deploy.export import export_model
from omniconv.deploy.serve.triton import write_triton_repository


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()

    class Scale(nn.Module):
        def forward(self, x):
            return x.float() / 255

    samples = [torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8)]
    export_model(model, Scale(), samples, folder, formats=("onnx",))
    return folder / "model.onnx"


def test_repository(exported, tmp_path):
    made = write_triton_repository(exported, tmp_path / "models", "pets", classes=["cat", "dog"], max_batch=8)
    config = (made / "config.pbtxt").read_text()
    session = onnxruntime.InferenceSession(made / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    for kind, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        block = re.search(rf"^{kind} \[\n(.*?)\n\]", config, re.S | re.M)
        assert block is not None
        assert re.findall(r'name: "(\w+)"', block[1]) == [value.name for value in values]
    assert "data_type: TYPE_UINT8, dims: [ 3, -1, -1 ]" in config
    assert 'data_type: TYPE_FP32, dims: [ 2 ], label_filename: "labels.txt"' in config
    assert "max_batch_size: 8" in config
    assert config.count("[") == config.count("]")
    assert config.count("{") == config.count("}")
    assert (made / "labels.txt").read_text().split() == ["cat", "dog"]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["pets"]


def test_wrong_calls(exported, tmp_path):
    with pytest.raises(UsageError, match="letters, digits"):
        write_triton_repository(exported, tmp_path, "../pets")
    with pytest.raises(UsageError, match="max_batch must be positive"):
        write_triton_repository(exported, tmp_path, "pets", max_batch=0)
    (tmp_path / "no.onnx").write_bytes(b"no")
    with pytest.raises(DataError, match="is no ONNX network"):
        write_triton_repository(tmp_path / "no.onnx", tmp_path, "pets")
    assert not (tmp_path / "pets").exists()
