"""Real trained weights: public CIFAR-10 ResNet-20 through export and int8 keeps its measured accuracy.

The weights (akamaster/pytorch_resnet_cifar10) answer 915 of the first 1,000 test images right.
"""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from omniconv.core.errors import DataError
from omniconv.data.preprocess import Preprocess
from omniconv.deploy.export import Deployable, export_model
from omniconv.deploy.int8 import quantize_int8
from omniconv.deploy.runtimes import open_exported
from omniconv.models.factory import create_model
from omniconv.papers.check import shared_data

RIGHT = 915


def needed(name):
    try:
        return shared_data(name)
    except DataError as error:
        pytest.skip(str(error))


def read(name, mosaics):
    """Return images (N, 3, 32, 32) uint8 and labels; each mosaic holds 1,000 images in 25 rows of 40."""
    with tarfile.open(needed(f"cifar10/{name}")) as tar:

        def content(member):
            file = tar.extractfile(member)
            assert file is not None
            return file.read()

        members = {member.rpartition("/")[2]: member for member in tar.getnames()}
        images = []
        for index in range(mosaics):
            with Image.open(io.BytesIO(content(members[f"{index:02d}.webp"]))) as mosaic:
                grid = np.array(mosaic.convert("RGB")).reshape(25, 32, 40, 32, 3)
            images.append(grid.transpose(0, 2, 4, 1, 3).reshape(1000, 3, 32, 32))
        lines = content(members["labels.txt"]).decode().replace(",", " ").splitlines()
    return np.concatenate(images), np.array([int(line.split()[0]) for line in lines])[: 1000 * mosaics]


@pytest.fixture(scope="module")
def test_images():
    return read("test1k-official-first1000.tar", 1)


@pytest.fixture(scope="module")
def deployable():
    weights = needed("weights/resnet20_cifar10.safetensors")
    model = create_model("resnet20_cifar", num_classes=10, pretrained=weights)
    preprocess = Preprocess(32, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return Deployable(preprocess, model, "probabilities").eval()


@pytest.fixture(scope="module")
def onnx_path(deployable, test_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet20")
    samples = [torch.from_numpy(image) for image in test_images[0][:4]]
    export_model(deployable.model, deployable.preprocess, samples, folder, formats=("onnx",))
    return folder / "model.onnx"


def test_eager_and_onnx_take_the_same_decisions(deployable, onnx_path, test_images):
    images, labels = test_images
    with torch.inference_mode():
        eager = deployable(torch.from_numpy(images)).numpy()
    exported = open_exported(onnx_path)(images)
    assert (eager.argmax(1) == labels).sum() == RIGHT
    assert (exported.argmax(1) == labels).sum() == RIGHT
    np.testing.assert_array_equal(exported.argmax(1), eager.argmax(1))
    np.testing.assert_allclose(exported, eager, atol=1e-4)


def test_int8_loses_at_most_ten(onnx_path, test_images, tmp_path):
    images, labels = test_images
    training, _ = read("train20k.tar", 1)
    report = quantize_int8(onnx_path, training[:256], tmp_path / "int8.onnx", min_speedup=0)
    assert report.bytes_after < 0.4 * report.bytes_before
    right = (open_exported(tmp_path / "int8.onnx")(images).argmax(1) == labels).sum()
    assert right >= RIGHT - 10
