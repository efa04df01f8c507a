"""IDX and NPZ files written here byte by byte or by numpy."""

import gzip
import struct
import zipfile

import numpy as np
import pytest
import torch

from omniconv.core.errors import DataError, UsageError
from omniconv.data.sources import open_images

RNG = np.random.default_rng(1)
IMAGES = RNG.integers(0, 256, (6, 5, 4), np.uint8)
LABELS = np.array([3, 1, 3, 0, 1, 3], np.uint8)


def idx(array: np.ndarray) -> bytes:
    code = {"uint8": 8, "int32": 12, "float32": 13}[str(array.dtype)]
    big = array.astype(array.dtype.newbyteorder(">"))
    return struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + big.tobytes()


def test_idx_with_splits(tmp_path):
    (tmp_path / "train30k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES)))
    (tmp_path / "train30k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))
    (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx(255 - IMAGES[:2]))
    (tmp_path / "t10k-labels.idx1-ubyte").write_bytes(idx(LABELS[:2]))
    data = open_images(tmp_path)
    assert data.schema.classes == ("0", "1", "3")
    assert [s.target for s in data.samples] == [2, 1, 2, 0, 1, 2, 2, 1]
    assert [s.split for s in data.samples] == ["train"] * 6 + ["test"] * 2
    assert (data.samples[0].id, data.samples[7].id) == ("train30k/0", "t10k/1")
    assert data.stacked is not None
    np.testing.assert_array_equal(data.stacked.numpy(), np.concatenate([IMAGES, 255 - IMAGES[:2]])[:, None])
    assert data.read(6).equal(torch.from_numpy(255 - IMAGES[:1]))
    assert (data.schema.height, data.schema.width, data.schema.channels, data.schema.high) == (5, 4, 1, 255)


def test_idx_without_labels_or_with_numbers(tmp_path):
    (tmp_path / "images-idx3-ubyte").write_bytes(idx(IMAGES))
    data = open_images(tmp_path)
    assert (data.schema.task, data.samples[3].id) == ("none", "images/3")
    (tmp_path / "labels-idx1-ubyte").write_bytes(idx(RNG.random(6).astype(np.float32)))
    assert open_images(tmp_path, task="regression").schema.task == "regression"


@pytest.mark.parametrize(
    ("images", "labels", "reason"),
    [
        (idx(IMAGES)[:-1], idx(LABELS), "cut off: 119 of 120 bytes"),
        (b"\0\0\x08", idx(LABELS), "train-images-idx3-ubyte is unreadable"),
        (b"hello, this is text", idx(LABELS), "first bytes are not those of an IDX file"),
        (idx(IMAGES), idx(LABELS[:5]), "holds 6 images, its label file 5 labels"),
        (
            struct.pack(">HBBIII", 0, 8, 3, 2**31, 2**12, 2**12),
            idx(LABELS),
            "was not decoded: its header says",
        ),
        (struct.pack(">HBBIII", 0, 8, 3, 2**15, 2**8, 2**8), idx(LABELS), "cut off: 0 of"),
        (idx(LABELS), idx(LABELS), "holds no images"),
    ],
)
def test_damaged_idx(tmp_path, images, labels, reason):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(DataError, match=reason):
        open_images(tmp_path)


def test_damaged_gzip(tmp_path):
    content = bytearray(gzip.compress(idx(IMAGES)))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
        open_images(tmp_path)


def test_labels_of_one_part_are_missing(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(IMAGES))
    with pytest.raises(DataError, match="t10k images without labels"):
        open_images(tmp_path)


@pytest.mark.parametrize("keys", ["x_{}|y_{}", "{}_images|{}_labels", "X_{}|Y_{}", "images-{}|targets-{}"])
def test_npz_with_splits(tmp_path, keys):
    x, y = keys.split("|")
    arrays = {}
    for split, part in (("train", slice(4)), ("val", slice(4, 5)), ("test", slice(5, 6))):
        arrays[x.format(split)] = IMAGES[part]
        arrays[y.format(split)] = LABELS[part, None].astype(np.int64)
    np.savez_compressed(tmp_path / "set.npz", **arrays)
    data = open_images(tmp_path / "set.npz")
    assert [s.split for s in data.samples] == ["train"] * 4 + ["val", "test"]
    assert [data.schema.classes[s.target] for s in data.samples] == ["3", "1", "3", "0", "1", "3"]
    assert data.read(5).equal(torch.from_numpy(IMAGES[5:]))
    assert open_images(tmp_path).fingerprint == data.fingerprint  # a folder with one NPZ file


@pytest.mark.parametrize(
    ("array", "expected", "dtype", "high"),
    [
        (np.moveaxis(np.stack([IMAGES] * 3), 0, 3), np.stack([IMAGES] * 3, 1), torch.uint8, 255),
        (np.stack([IMAGES] * 3, 1), np.stack([IMAGES] * 3, 1), torch.uint8, 255),
        (IMAGES.astype(np.int64), IMAGES[:, None], torch.uint8, 255),
        (IMAGES.astype(np.uint16), IMAGES[:, None], torch.float32, 65535),
        (IMAGES / 256.0, IMAGES[:, None] / 256, torch.float32, IMAGES.max() / 256),
    ],
)
def test_npz_pixels(tmp_path, array, expected, dtype, high):
    np.savez(tmp_path / "set.npz", images=array)
    data = open_images(tmp_path / "set.npz")
    assert (data.dtype, data.schema.high) == (dtype, high)
    np.testing.assert_array_equal(
        data.stacked.numpy(), expected.astype(np.float32 if dtype != torch.uint8 else np.uint8)
    )


def test_npz_labels(tmp_path):
    def task(labels, **more):
        np.savez(tmp_path / "set.npz", images=IMAGES, labels=labels, **more)
        data = open_images(tmp_path / "set.npz")
        return data.schema.task, data.schema.classes, [s.target for s in data.samples]

    assert task(np.array(list("cabcab"))) == ("classification", ("a", "b", "c"), [2, 0, 1, 2, 0, 1])
    assert task(np.eye(3)[[2, 0, 1, 2, 0, 1]])[::2] == ("classification", [2, 0, 1, 2, 0, 1])
    several = np.array([[1, 1], [0, 0], [1, 0], [0, 1], [0, 1], [1, 1]])
    assert task(several)[::2] == ("multilabel", [tuple(map(float, row)) for row in several])
    assert task(several.astype(bool))[0] == "multilabel"
    numbers = np.array([[0.5, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]])
    assert task(numbers)[::2] == ("regression", [tuple(row) for row in numbers])
    named = task(LABELS, class_names=np.array(["zero", "one", "two", "three"]))
    assert named == ("classification", ("zero", "one", "two", "three"), [3, 1, 3, 0, 1, 3])


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"weights": np.zeros(3)}, "no array of images"),
        ({"x": IMAGES, "y": LABELS[:3]}, "6  images and 3 labels"),
        ({"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES}, "test images without labels"),
        (
            {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:, 1:], "y_test": LABELS},
            "4 x 5 x 1 and of 4 x 4 x 1",
        ),
        ({"x": np.full((2, 3, 3), np.nan), "y": LABELS[:2]}, "not finite"),
        ({"x": IMAGES.astype(object), "y": LABELS}, "pickle"),
    ],
)
def test_wrong_npz(tmp_path, arrays, reason):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=reason):
        open_images(tmp_path / "set.npz")


def test_damaged_npz(tmp_path):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, x=IMAGES, y=LABELS)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no zip at all"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"set\.npz is unreadable"):
            open_images(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (2**22, 2**12, 2**12)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(DataError, match="more than half of the memory"):
        open_images(path)


def test_digits(tmp_path, monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.chdir(tmp_path)
    data = open_images("digits")
    bunch = load_digits()
    assert len(data) == 1797
    assert [s.target for s in data.samples] == bunch.target.tolist()
    np.testing.assert_allclose(data.stacked[:, 0].numpy() / 255 * 16, bunch.images, atol=0.05)
    assert (data.schema.high, data.stacked.max().item()) == (255, 255)
    with pytest.raises(UsageError, match="target names a column"):
        open_images("digits", target="x")
    (tmp_path / "digits").mkdir()
    with pytest.raises(DataError, match="no pictures"):  # a folder of that name comes first
        open_images("digits")
