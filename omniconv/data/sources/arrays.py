"""Images in arrays: IDX files (the format of MNIST), NPZ files, and scikit-learn's digits."""

import gzip
import math
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from omniconv.core.errors import DataError
from omniconv.data.decode import MAX_PIXELS
from omniconv.data.schema import Problem, Sample, Split, Task, printable
from omniconv.data.sources.base import ArrayImages, split_name
from omniconv.data.sources.targets import Labels, Where, one_column, several_columns

__all__ = ["find_idx", "open_digits", "open_idx", "open_npz"]

_IDX = re.compile(
    r"(?P<prefix>.*?)[-_.]?(?P<what>images|labels)[-_.]idx[0-9]([-_.]ubyte)?(\.gz)?", re.IGNORECASE
)
_IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def open_digits() -> ArrayImages:
    """Return the 1,797 handwritten digits that scikit-learn ships, 8 x 8, scaled from 0..16 to 0..255."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.rint(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)[:, None]
    samples = [Sample(f"digits/{i}", int(label)) for i, label in enumerate(bunch.target)]
    return ArrayImages("digits", Path("digits"), images, samples, "classification", tuple("0123456789"), [])


def _check_bytes(name: str, size: int) -> None:
    """Refuse an array that does not fit in half of the memory, before anything of it is decoded."""
    try:
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # Windows
        most = 8 << 30
    if size > most:
        raise DataError(
            f"{name} was not decoded: its header says {size / 2**30:.3g} GiB, more than half of the memory; "
            "store the images as files"
        )


# IDX


def find_idx(folder: Path) -> dict[str, dict[str, Path]]:
    """Return {prefix: {"images": path, "labels": path}} of the IDX files of a folder (`train`, `t10k`)."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _IDX.fullmatch(path.name)
        if match and path.is_file():
            # Both t10k-images-idx3-ubyte and its .gz: the first in order, without .gz, is enough.
            found.setdefault(match["prefix"], {}).setdefault(match["what"].lower(), path)
    return found


def _idx_split(prefix: str) -> Split | None:
    word = prefix.casefold()
    if word.startswith(("t10k", "test")):
        return "test"
    if word.startswith("val"):
        return "val"
    return "train" if word.startswith("train") else None


def _read_idx(path: Path) -> np.ndarray:
    name = printable(path.name)
    try:
        opener = gzip.open if path.suffix.lower() == ".gz" else open
        with opener(path, "rb") as file:
            zero, code, axes = struct.unpack(">HBB", file.read(4))
            if zero or code not in _IDX_TYPES or not axes:
                raise DataError(f"{name} is unreadable: its first bytes are not those of an IDX file")
            shape = struct.unpack(f">{axes}I", file.read(4 * axes))
            dtype = np.dtype(_IDX_TYPES[code])
            size = math.prod(shape) * dtype.itemsize
            _check_bytes(name, size)
            # In pieces: a header that lies costs no more memory than the file really holds.
            content = bytearray()
            while len(content) < size and (piece := file.read(min(1 << 24, size - len(content)))):
                content += piece
            more = file.read(1)  # only at the end does gzip compare its checksum
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"{name} is unreadable: {' '.join(str(error).split())}") from None
    if len(content) < size:
        raise DataError(f"{name} is cut off: {len(content)} of {size} bytes are there")
    if more:
        raise DataError(
            f"{name} is unreadable: it holds more than the {size} bytes that its header announces"
        )
    return np.frombuffer(content, dtype).reshape(shape)


def open_idx(folder: Path, task: Task | None = None) -> ArrayImages:
    """Return the images and labels of the IDX files in a folder; `t10k` and `test` are the test split.

    Raises:
        DataError: if a file is damaged, image files do not fit together, or labels are missing.
    """
    pairs = find_idx(folder)
    parts = [prefix for prefix, files in pairs.items() if "images" in files]
    if not parts:
        raise DataError(f"{folder} has IDX labels and no images (a file like train-images-idx3-ubyte.gz)")
    parts.sort(key=lambda prefix: ("train", "val", "test", None).index(_idx_split(prefix)))
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    samples: list[Sample] = []
    for prefix in parts:
        name = printable(pairs[prefix]["images"].name)
        array = to_nchw(_read_idx(pairs[prefix]["images"]), name)
        if "labels" in pairs[prefix]:
            labels.append(_read_idx(pairs[prefix]["labels"]))
            if labels[-1].shape != (len(array),):
                shape = "x".join(map(str, labels[-1].shape))
                raise DataError(f"{name} holds {len(array)} images, its label file {shape} labels")
        stem = printable(prefix) or "images"
        samples += [Sample(f"{stem}/{i}", None, None, _idx_split(prefix)) for i in range(len(array))]
        images.append(array)
    if labels and len(labels) < len(images):
        missing = printable(next(prefix for prefix in parts if "labels" not in pairs[prefix]))
        raise DataError(
            f"{folder} has {missing} images without labels; add the file {missing}-labels-idx1-ubyte"
        )
    return _assemble(printable(folder.resolve().name), folder, images, samples, labels, task, [])


def _size(array: np.ndarray) -> str:
    return f"{array.shape[3]} x {array.shape[2]} x {array.shape[1]}"


def to_nchw(array: np.ndarray, name: str) -> np.ndarray:
    """Return images N x H x W, N x H x W x C or N x C x H x W as (N, C, H, W): uint8, uint16 or float32."""
    if array.dtype.kind not in "buif" or array.ndim not in (3, 4) or 0 in array.shape:
        shape = "x".join(map(str, array.shape))
        raise DataError(
            f"{name} holds no images: {array.dtype} of shape {shape}; images are N x H x W or N x H x W x C"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif not array.shape[1] < array.shape[3]:
        array = np.moveaxis(array, 3, 1)
    if array.shape[2] * array.shape[3] > MAX_PIXELS:
        raise DataError(
            f"{name} holds images of {_size(array)}; the limit is {MAX_PIXELS // 10**6} million pixels"
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind in "ui" and array.dtype != np.uint8:
        # Whole numbers are often stored wider than they are.
        low, high = int(array.min()), int(array.max())
        if low >= 0 and high <= 255 and array.dtype != np.uint16:
            array = array.astype(np.uint8)
        elif low >= 0 and high <= 65535:
            array = array.astype(np.uint16)
    if array.dtype not in (np.uint8, np.uint16):
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise DataError(f"{name} holds pixel values that are not finite numbers")
    return np.ascontiguousarray(array)


def _assemble(
    name: str,
    source: Path,
    images: list[np.ndarray],
    samples: list[Sample],
    labels: list[np.ndarray],
    task: Task | None,
    problems: list[Problem],
    names: tuple[str, ...] | None = None,
) -> ArrayImages:
    """Join the parts of a set and give their labels a meaning."""
    first = images[0]
    for part in images:
        if part.shape[1:] != first.shape[1:]:
            raise DataError(
                f"{source} holds images of {_size(first)} and of {_size(part)}; store them as files"
            )
    high = 65535.0 if all(part.dtype == np.uint16 for part in images) else None
    if any(part.dtype != np.uint8 for part in images):
        images = [part.astype(np.float32) for part in images]
    joined = np.concatenate(images) if len(images) > 1 else images[0]
    if not labels or task == "none":
        if task not in (None, "none"):
            raise DataError(f"{source}: {len(joined)} images, no labels")
        return ArrayImages(name, source, joined, samples, "none", (), problems, high=high)
    if len({part.shape[1:] for part in labels}) > 1:
        raise DataError(f"{source} holds labels of different shapes")
    found = _label_table(np.concatenate(labels), task, lambda i: f"{name}: the label of {samples[i].id}")
    if found.note:
        problems.append(Problem("guess", found.note, (), "info"))
    if None in found.targets:
        raise DataError(f"{name}: {samples[found.targets.index(None)].id} has no label")
    classes = found.classes
    if (
        names is not None
        and found.task == "classification"
        and all(c.isdigit() and int(c) < len(names) for c in classes)
    ):
        # Labels count into the list of names, of which some may have no image.
        targets = [int(classes[t]) for t in found.targets if isinstance(t, int)]
        found, classes = Labels("classification", names, list(targets)), names
    samples = [
        Sample(s.id, target, s.group, s.split) for s, target in zip(samples, found.targets, strict=True)
    ]
    return ArrayImages(name, source, joined, samples, found.task, classes, problems, high=high)


def _label_table(array: np.ndarray, task: Task | None, where: Where) -> Labels:
    if array.dtype.kind not in "buifUS":
        raise DataError(f"labels must be numbers or text, got {array.dtype}")
    rows = array.reshape(len(array), -1)
    columns = [[_text(value) for value in column] for column in rows.T.tolist()]
    if array.dtype.kind == "b":
        columns = [[str(int(value == "True")) for value in column] for column in columns]
    if len(columns) == 1:
        return one_column("label", columns[0], task, where)
    return several_columns({str(i): column for i, column in enumerate(columns)}, task, where)


# NPZ

_IMAGE_KEYS = {"x", "image", "images", "img", "imgs", "data", "pixels", "pictures"}
_LABEL_KEYS = {"y", "label", "labels", "target", "targets", "class", "classes"}
_NAME_KEYS = {"classnames", "labelnames", "names", "targetnames"}


def open_npz(path: Path, task: Task | None = None) -> ArrayImages:
    """Return the arrays of an NPZ file: `x_train`, `y_train`, `train_images`, `images`, `labels` and so on.

    Labels may be integers, names, one-hot rows or several 0/1 columns (multi-label), or numbers (regression).

    Raises:
        DataError: if the file is damaged, needs pickle, or no array is found to hold images.
    """
    name = printable(path.name)
    arrays = _read_npz(path, name)
    images: dict[Split | None, np.ndarray] = {}
    labels: dict[Split | None, np.ndarray] = {}
    names: tuple[str, ...] | None = None
    unused: list[str] = []
    for key, array in arrays.items():
        words = [word for word in re.split(r"[^0-9a-z]+", key.casefold()) if word]
        split: Split | None = next((found for word in words if (found := split_name(word))), None)
        rest = "".join(word for word in words if not split_name(word))
        if rest in _IMAGE_KEYS and split not in images and array.ndim >= 3:
            images[split] = to_nchw(array, f"{name}: {printable(key)}")
        elif (
            rest in _NAME_KEYS | {"classes"}
            and array.ndim == 1
            and array.dtype.kind in "US"
            and split is None
        ):
            names = tuple(map(_text, array))
        elif rest in _LABEL_KEYS and split not in labels and array.ndim in (1, 2):
            labels[split] = array
        else:
            unused.append(printable(key))
    if not images and len(arrays) == 1 and (only := next(iter(arrays.values()))).ndim >= 3:
        images, unused = {None: to_nchw(only, name)}, []
    if not images:
        keys = ", ".join(map(printable, arrays)) or "none"
        raise DataError(
            f"{name} has no array of images (arrays: {keys}); call it images, or x_train and x_test"
        )
    problems = []
    if unused:
        problems.append(
            Problem("ignored", f"arrays that were not used: {', '.join(unused)}", tuple(unused), "info")
        )
    order = sorted(images, key=lambda split: ("train", "val", "test", None).index(split))
    samples: list[Sample] = []
    cells: list[np.ndarray] = []
    for split in order:
        count = len(images[split])
        if labels:
            if split not in labels:
                raise DataError(f"{name} has {split or ''} images without labels; add the array y_{split}")
            if len(labels[split]) != count:
                raise DataError(f"{name} has {count} {split or ''} images and {len(labels[split])} labels")
            cells.append(labels[split])
        samples += [Sample(f"{split or 'images'}/{i}", None, None, split) for i in range(count)]
    stem = printable(path.stem)
    return _assemble(stem, path, [images[split] for split in order], samples, cells, task, problems, names)


def _text(value: object) -> str:
    return printable(value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value))


def _read_npz(path: Path, name: str) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(file)
                if dtype.hasobject:
                    raise DataError(
                        f"{name}: {printable(member.filename)} is a pickle, which can run code; save plain arrays"
                    )
                _check_bytes(name, math.prod(shape) * dtype.itemsize)
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except DataError:
        raise
    except Exception as error:  # damaged archives make zipfile, zlib and numpy fail in many ways
        raise DataError(f"{name} is unreadable: {printable(' '.join(str(error).split())[:200])}") from None
