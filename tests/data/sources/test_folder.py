"""Class folders as people have them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omniconv.core.errors import DataError, UsageError
from omniconv.data.sources import open_images


def picture(path: Path, value: int = 0, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, value, value)).save(path)


def tree(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        picture(root / name, number)
    return root


def kinds(data) -> list[str]:
    return [problem.kind for problem in data.problems]


def seen(data) -> dict[str, tuple]:
    return {
        s.id: (None if s.target is None else data.schema.classes[s.target], s.split) for s in data.samples
    }


def test_class_folders(tmp_path):
    data = open_images(tree(tmp_path, "dog/1.png", "cat/2.png", "cat/1.png"))
    assert seen(data) == {"cat/1.png": ("cat", None), "cat/2.png": ("cat", None), "dog/1.png": ("dog", None)}
    schema = data.schema
    assert (schema.task, schema.classes, schema.channels) == ("classification", ("cat", "dog"), 3)
    assert (schema.low, schema.high, schema.height, schema.width) == (0, 255, 4, 6)
    image = data.read(2)
    assert (image.dtype, image.shape, data.dtype) == (torch.uint8, (3, 4, 6), torch.uint8)
    assert image.unique().tolist() == [0]
    assert (data.name, data.source, data.path(0)) == (tmp_path.name, tmp_path, tmp_path / "cat/1.png")
    assert data.problems == []


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "val", "test"), ("Training", "valid", "TESTING"), ("train", "validation", "test")],
)
def test_splits(tmp_path, train, val, test):
    root = tree(tmp_path, f"{train}/a/1.png", f"{train}/b/1.png", f"{val}/a/2.png", f"{test}/b/3.png")
    data = open_images(root)
    assert seen(data) == {
        f"{train}/a/1.png": ("a", "train"),
        f"{train}/b/1.png": ("b", "train"),
        f"{val}/a/2.png": ("a", "val"),
        f"{test}/b/3.png": ("b", "test"),
    }


def test_splits_inside_of_classes(tmp_path):
    data = open_images(tree(tmp_path, "a/train/1.png", "a/test/2.png", "b/train/1.png", "b/test/1.png"))
    assert data.schema.classes == ("a", "b")
    assert seen(data)["a/test/2.png"] == ("a", "test")


def test_classes_that_are_called_like_a_split(tmp_path):
    data = open_images(tree(tmp_path, "train/1.png", "bus/1.png", "car/1.png"))
    assert data.schema.classes == ("bus", "car", "train")


def test_a_folder_beside_the_splits_is_left_out(tmp_path):
    data = open_images(tree(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png", "extra/x/1.png"))
    assert data.schema.classes == ("a", "b")
    (problem,) = data.problems
    assert (problem.kind, problem.ids) == ("unlabelled", ("extra/x/1.png",))


def test_unlabelled_test_pictures_are_left_out(tmp_path):
    data = open_images(tree(tmp_path, "train/a/1.png", "train/b/1.png", "test/1.png"))
    assert len(data) == 2
    assert data.problems[0].ids == ("test/1.png",)


def test_wrapping_and_nested_folders(tmp_path):
    data = open_images(tree(tmp_path, "images/set/cat/siam/1.png", "images/set/dog/2.png"))
    assert seen(data)["images/set/cat/siam/1.png"] == ("cat", None)
    assert kinds(data) == ["nested"]


def test_numbered_classes_count(tmp_path):
    data = open_images(tree(tmp_path, *(f"{n}/1.png" for n in (10, 9, 2, 0))))
    assert data.schema.classes == ("0", "2", "9", "10")


def test_what_is_not_a_picture_is_mentioned(tmp_path):
    tree(tmp_path, "a/1.png", "b/1.png", "__MACOSX/a/1.png", "a/._1.png", ".git/b/2.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "a/Thumbs.db").write_text("x")
    data = open_images(tmp_path)
    assert len(data) == 2
    assert [problem.message for problem in data.problems] == [
        "ignored 1 file other than pictures: notes.txt",
        "ignored 4 hidden files and folders",
    ]


@pytest.mark.parametrize("names", [("1.png", "2.png"), ("cats/1.png", "cats/2.png"), ("train/x/1.png",)])
def test_no_labels(tmp_path, names):
    data = open_images(tree(tmp_path, *names))
    assert (data.schema.task, data.schema.classes) == ("none", ())
    assert [s.target for s in data.samples] == [None] * len(names)
    with pytest.raises(DataError, match="no labels; give --labels FILE"):
        open_images(tmp_path, task="classification")


def test_labels_can_be_left_aside(tmp_path):
    data = open_images(tree(tmp_path, "a/1.png", "b/1.png"), task="none")
    assert (data.schema.task, len(data)) == ("none", 2)


def test_class_folders_give_no_regression(tmp_path):
    with pytest.raises(UsageError, match="--labels"):
        open_images(tree(tmp_path, "a/1.png", "b/1.png"), task="regression")


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="no pictures"):
        open_images(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no pictures.*notes\.txt"):
        open_images(tmp_path)
    (tmp_path / "pets").mkdir()
    with pytest.raises(DataError, match=r"no file or folder .*did you mean .*pets"):
        open_images(tmp_path / "petss")


def test_grey_among_colour_becomes_rgb(tmp_path):
    picture(tmp_path / "a/1.png", 7, mode="L")
    picture(tmp_path / "b/1.png", 9)
    data = open_images(tmp_path)
    assert data.schema.channels == 3
    assert kinds(data) == ["mixed-channels"]
    assert data.read(0).unique().tolist() == [7]
    assert data.read(0).shape[0] == 3


def test_grey_stays_grey(tmp_path):
    picture(tmp_path / "a/1.png", 7, mode="L")
    picture(tmp_path / "b/1.png", 9, mode="L")
    assert open_images(tmp_path).schema.channels == 1


def test_sixteen_bits_among_eight(tmp_path):
    picture(tmp_path / "a/1.png", 255, mode="L")
    (tmp_path / "b").mkdir()
    Image.fromarray(np.full((4, 6), 1234, np.uint16)).save(tmp_path / "b/1.png")
    data = open_images(tmp_path)
    assert (data.schema.low, data.schema.high, data.dtype) == (0, 65535, torch.float32)
    assert data.read(0).unique().tolist() == [65535]
    assert data.read(1).unique().tolist() == [1234]
    assert kinds(data) == ["mixed-depth"]


def test_float_data_has_an_observed_range(tmp_path):
    for name, value in (("a", -1.5), ("b", 3.0)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "1.npy", np.full((5, 4, 6), value))
    data = open_images(tmp_path)
    assert (data.schema.channels, data.schema.low, data.schema.high) == (5, -1.5, 3.0)
    assert data.read(0).shape == (5, 4, 6)


def test_other_channels_than_the_majority(tmp_path):
    tree(tmp_path, "a/1.png", "b/1.png")
    np.save(tmp_path / "a/2.npy", np.zeros((8, 6, 5), np.uint8))
    data = open_images(tmp_path)
    problem = data.problems[0]
    assert (problem.kind, problem.ids, problem.severity) == ("unreadable", ("a/2.npy",), "error")
    with pytest.raises(DataError, match=r"a/2\.npy has 5 channels where 3 are needed"):
        data.read(1)


def test_unreadable_headers_are_problems(tmp_path):
    tree(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a/0.png").write_bytes(b"")
    (tmp_path / "b/2.jpg").write_bytes(b"text")
    data = open_images(tmp_path)
    assert [p.ids for p in data.problems if p.kind == "unreadable"] == [("a/0.png",), ("b/2.jpg",)]
    assert len(data) == 4


def test_all_unreadable(tmp_path):
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        DataError, match=r"none of 2 images can be read; the first: a/1\.png is unreadable: it is empty"
    ):
        open_images(tmp_path)


def test_sizes_and_pages_are_mentioned(tmp_path):
    picture(tmp_path / "a/1.png", size=(6, 4))
    picture(tmp_path / "b/1.png", size=(10, 8))
    frames = [Image.new("L", (10, 8), value) for value in (1, 2)]
    frames[0].save(tmp_path / "b/2.tif", save_all=True, append_images=frames[1:])
    data = open_images(tmp_path)
    assert "images are 6 to 10 pixels wide and 4 to 8 high" in [p.message for p in data.problems]
    assert ("b/2.tif",) in [p.ids for p in data.problems if p.kind == "pages"]


def test_odd_names_and_links(tmp_path):
    root = tmp_path / "data"
    tree(root, "a/1.png", "b/1.png")
    picture(tmp_path / "outside/secret.png")
    os.symlink(tmp_path / "outside/secret.png", root / "a/link.png")
    os.symlink(tmp_path / "outside", root / "c")
    os.symlink(root, root / "b/loop")
    os.symlink(root / "a/1.png", root / "a/inner.png")
    os.rename(root / "b/1.png", os.path.join(os.fsencode(root), b"b/new\nline\xff.png"))
    data = open_images(root)
    assert [s.id for s in data.samples] == ["a/1.png", "a/inner.png", r"b/new\nline\xff.png"]
    assert data.read(2).shape == (3, 4, 6)
    (problem,) = [p for p in data.problems if p.kind == "link"]
    assert sorted(problem.ids) == ["a/link.png", "b/loop", "c"]


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Root may read everything, so let go of that for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_permissions():
    # Not below tmp_path, which nobody but its owner may enter.
    with tempfile.TemporaryDirectory() as folder:
        root = tree(Path(folder), "a/1.png", "b/1.png", "c/1.png")
        root.chmod(0o755)
        (root / "a/1.png").chmod(0)
        with as_somebody_else():
            data = open_images(root)
        assert [p.message for p in data.problems] == ["a/1.png is unreadable: permission denied"]
        (root / "c").chmod(0)
        with as_somebody_else(), pytest.raises(DataError, match=f"cannot list {root}/c: permission denied"):
            open_images(root)
        root.chmod(0)
        with as_somebody_else(), pytest.raises(DataError, match="permission denied"):
            open_images(root)
        root.chmod(0o755)
        (root / "c").chmod(0o755)


def test_single_picture_and_other_files(tmp_path):
    tree(tmp_path, "one.png")
    data = open_images(tmp_path / "one.png")
    assert (data.schema.task, data.samples[0].id, len(data)) == ("none", "one.png", 1)
    (tmp_path / "data.zip").write_bytes(b"PK")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match="unpack"):
        open_images(tmp_path / "data.zip")
    with pytest.raises(DataError, match="no picture, table or array"):
        open_images(tmp_path / "x.txt")
    with pytest.raises(UsageError, match="task must be one of"):
        open_images(tmp_path, task="classify")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="group names a column"):
        open_images(tmp_path, group="x")


def test_fingerprint_follows_the_data(tmp_path):
    tree(tmp_path, "a/1.png", "b/1.png")
    first = open_images(tmp_path).fingerprint
    assert open_images(tmp_path).fingerprint == first
    picture(tmp_path / "b/2.png")
    assert open_images(tmp_path).fingerprint != first
