"""Exports are compared with a second computation: preprocessing in NumPy and Pillow, then the eager network."""

import collections
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from omniconv.core.errors import RefusedError, ResourceError, UsageError
from omniconv.data.preprocess import Preprocess
from omniconv.deploy.export import Deployable, export_model
from omniconv.deploy.runtimes import open_exported
from omniconv.models.factory import create_model

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
SUFFIX = {"torch": "pt2", "onnx": "onnx", "openvino": "xml"}


def picture(height, width, seed=0, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator).to(dtype)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = create_model("resnet_test", num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Running statistics and scales that do something, and decisions that are not all alike.
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    nn.init.normal_(model.fc.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    samples = [picture(20, 31), picture(20, 31, 1), picture(16, 16, 2)]
    report = export_model(
        network,
        Preprocess(16, MEAN, STD),
        samples,
        folder,
        formats=("torch", "onnx", "openvino"),
        names=list("abcde"),
        metadata={"data": "pictures", "counts": {"train": 3}},
    )
    return folder, report


@pytest.mark.parametrize("kind", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize(
    ("height", "width", "count"), [(16, 16, 1), (40, 23, 3), (9, 70, 2), (128, 97, 1), (1, 1, 4)]
)
def test_takes_raw_pixels_of_any_size(exported, network, kind, height, width, count):
    run = open_exported(exported[0] / f"model.{SUFFIX[kind]}")
    images = torch.stack([picture(height, width, seed) for seed in range(count)])
    ready = []
    for image in images.numpy():
        # Pillow's bilinear resize of float channels is the antialiased one.
        planes = [
            Image.fromarray(plane.astype(np.float32) / 255).resize((16, 16), Image.BILINEAR)
            for plane in image
        ]
        ready.append([(np.asarray(p) - m) / s for p, m, s in zip(planes, MEAN, STD, strict=True)])
    with torch.inference_mode():
        want = network.eval()(torch.tensor(np.array(ready), dtype=torch.float32)).softmax(1).numpy()
    np.testing.assert_allclose(run(images.numpy()), want, atol=1e-4)


def test_report_says_what_is_on_disk(exported):
    folder, report = exported
    assert sorted(os.listdir(folder)) == ["model.bin", "model.onnx", "model.pt2", "model.xml"]
    sizes = {file.format: file.bytes for file in report.files}
    assert sizes["onnx"] == (folder / "model.onnx").stat().st_size
    assert sizes["openvino"] == (folder / "model.xml").stat().st_size + (folder / "model.bin").stat().st_size
    assert all(file.verified and file.max_difference <= report.tolerance for file in report.files)
    assert len({tuple(shape[2:]) for shape in report.batches}) >= 4
    assert {shape[0] for shape in report.batches} == {1, 2, 5}
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_onnx_file_explains_itself_and_nothing_of_this_machine(exported):
    model = onnx.load(exported[0] / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    (image,), (output,) = model.graph.input, model.graph.output
    assert image.name == "image"
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == ["N", 3, "H", "W"]
    assert output.name == "probabilities"
    assert [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim] == ["N", 5]
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(props["classes"]) == list("abcde")
    assert json.loads(props["preprocess"])["size"] == [16, 16]
    assert (props["output"], props["data"], json.loads(props["counts"])) == (
        "probabilities",
        "pictures",
        {"train": 3},
    )
    for name in ("model.onnx", "model.pt2", "model.xml"):
        assert b"site-packages" not in (exported[0] / name).read_bytes()


def test_batch_norm_is_folded(exported):
    counts = collections.Counter(node.op_type for node in onnx.load(exported[0] / "model.onnx").graph.node)
    assert counts["Conv"] > 0
    assert counts["BatchNormalization"] == 0


@pytest.mark.parametrize(("output", "name"), [("multilabel", "probabilities"), ("values", "values")])
def test_other_outputs(tmp_path, output, name):
    network = chain(nn.Identity())
    sample = picture(18, 15, dtype=torch.float32) * 10 + 0.5
    preprocess = Preprocess((12, 20), MEAN, STD, low=-3.0, high=2560.0)
    units = ([1.0, -2.0, 0.5], [3.0, 0.1, 40.0]) if output == "values" else None
    report = export_model(
        network, preprocess, [sample], tmp_path, formats=("onnx",), output=output, units=units
    )
    graph = onnx.load(tmp_path / report.files[0].path).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert graph.output[0].name == name
    with torch.inference_mode():
        logits = network.eval()(preprocess(sample[None]))
    want = logits.sigmoid() if units is None else logits * torch.tensor(units[1]) + torch.tensor(units[0])
    np.testing.assert_allclose(
        open_exported(tmp_path / "model.onnx")(sample[None].numpy()), want, rtol=1e-4, atol=1e-4
    )


class Drifting(nn.Module):
    """Computes something else as soon as it is traced: the fault that verification is there for."""

    def forward(self, x):
        return x + 0.5 if torch.compiler.is_compiling() else x


class WronglyMerged(nn.Conv2d):
    """Claims that it merges to a module that it does not equal."""

    def merged(self):
        plain = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size)
        plain.load_state_dict(self.state_dict())
        nn.init.zeros_(plain.bias)
        return plain


def chain(odd):
    torch.manual_seed(1)
    stage = nn.Sequential(
        collections.OrderedDict(conv1=nn.Conv2d(4, 4, 1), odd=odd, act=nn.ReLU(inplace=True))
    )
    return nn.Sequential(
        collections.OrderedDict(
            stem=nn.Conv2d(3, 4, 3),
            stage=stage,
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(4, 3),
        )
    )


@pytest.mark.parametrize(("kind", "title"), [("torch", r"torch\.export"), ("openvino", "OpenVINO")])
def test_names_the_first_module_that_differs_and_writes_nothing(tmp_path, kind, title):
    message = rf"^{title} differs from PyTorch \(0\.\d+ > 1e-4\) after stage\.odd; nothing written$"
    with pytest.raises(RefusedError, match=message):
        export_model(
            chain(Drifting()), Preprocess(8, MEAN, STD), [picture(9, 11)], tmp_path / "new", formats=(kind,)
        )
    assert os.listdir(tmp_path) == []


def test_names_a_module_that_merges_wrongly(tmp_path):
    odd = WronglyMerged(4, 4, 1)
    nn.init.constant_(odd.bias, 1.0)
    with pytest.raises(RefusedError, match=r"after stage\.odd; nothing written$"):
        export_model(chain(odd), Preprocess(8, MEAN, STD), [picture(9, 11)], tmp_path, formats=("torch",))
    assert os.listdir(tmp_path) == []


def test_a_refused_export_leaves_the_earlier_one(tmp_path):
    sample, preprocess = [picture(9, 11)], Preprocess(8, MEAN, STD)
    export_model(chain(nn.Identity()), preprocess, sample, tmp_path, formats=("torch", "onnx"))
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(
        RefusedError, match=r"^ONNX differs from PyTorch \(0\.\d+ > 1e-4\) after stage\.odd; nothing written$"
    ):
        export_model(chain(Drifting()), preprocess, sample, tmp_path, formats=("onnx", "torch"))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


class NotFinite(nn.Module):
    def forward(self, x):
        return x * float("nan")


def test_refuses_a_network_that_gives_no_numbers(tmp_path):
    with pytest.raises(RefusedError, match=r"\(nan > 1e-4\)"):
        export_model(
            chain(NotFinite()), Preprocess(8, MEAN, STD), [picture(9, 11)], tmp_path, formats=("torch",)
        )


class DependsOnPixels(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_refuses_a_network_that_cannot_be_traced(tmp_path):
    with pytest.raises(
        RefusedError, match=r"^the network cannot be traced for any image size \(.*\); nothing written$"
    ):
        export_model(
            DependsOnPixels(), Preprocess(8, MEAN, STD), [picture(9, 9)], tmp_path, formats=("torch",)
        )
    assert os.listdir(tmp_path) == []


def test_refuses_a_network_that_takes_one_size_only(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 2))
    with pytest.raises(
        RefusedError, match=r"^the network takes no images of 2 x 3 x \d x \d \(.*\); nothing written$"
    ):
        export_model(model, nn.Identity(), [picture(3, 3, dtype=torch.float32)], tmp_path)
    assert os.listdir(tmp_path) == []


def test_says_nothing_and_leaves_the_model_alone(tmp_path, capfd):
    model = chain(nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_model(model, Preprocess(8, MEAN, STD), [picture(9, 11)], tmp_path, formats=("torch", "onnx"))
    assert capfd.readouterr() == ("", "")
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_usage_errors(tmp_path):
    with pytest.raises(UsageError, match=r"^no export format 'onx'; there are torch, onnx, openvino$"):
        export_model(chain(nn.Identity()), nn.Identity(), [picture(9, 9)], tmp_path, formats=("onx",))
    with pytest.raises(UsageError, match="at least one real sample"):
        export_model(chain(nn.Identity()), nn.Identity(), [], tmp_path)
    with pytest.raises(UsageError, match="output must be"):
        Deployable(nn.Identity(), nn.Identity(), "logits")  # type: ignore[arg-type]


@pytest.mark.parametrize(("package", "extra"), [("onnx", "export"), ("openvino", "openvino")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ResourceError, match=rf"needs {package}; install it with: pip install 'omniconv\[{extra}\]'"
    ):
        export_model(chain(nn.Identity()), nn.Identity(), [picture(9, 9)], tmp_path, formats=("openvino",))


def test_no_telemetry(tmp_path):
    """OpenVINO's usage statistics, which `import openvino` starts by itself, never start from here."""
    code = (
        "import sys\n"
        "from omniconv.deploy.runtimes import require\n"
        "require('openvino', 'this test', 'openvino')\n"
        "assert 'openvino_telemetry' not in sys.modules\n"
        "from openvino.tools.ovc import telemetry_utils\n"
        "print(telemetry_utils.tm.__name__)\n"
    )
    env = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "openvino.tools.ovc.telemetry_stub"
    assert os.listdir(tmp_path) == []
